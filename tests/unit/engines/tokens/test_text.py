"""Prompts in a model's own words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.errors import EngineUnavailable, RowError
from spider_worker.engines.tokens.text import TokenizerText, load_text

HELLO = [{"role": "user", "content": "the words of many"}]


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> TokenizerText:
    return load_text(str(tiny_model))


def word_level(*, begin: bool = False, end: bool = False, template: str | None = None) -> Any:
    """A tokenizer of single letters, which sets ``<s>`` before a text and ``</s>`` behind it where
    asked to."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = {letter: at for at, letter in enumerate("\n abcdefghijklmnopqrstuvwxyz:")}
    tokens = {**letters, "<s>": len(letters), "</s>": len(letters) + 1, "<u>": len(letters) + 2}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    text = " ".join(["<s>"] * begin + ["$A"] + ["</s>"] * end)
    special = [(name, tokens[name]) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=text, special_tokens=special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<u>"
    )
    fast.chat_template = template
    return fast


def shown(tokenizer: Any, tokens: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(tokens))


def test_messages_are_set_in_the_models_own_template(chat: TokenizerText, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokens = chat.render([{"role": "system", "content": "count"}, *HELLO])
    text = AutoTokenizer.from_pretrained(tiny_model).decode(tokens)
    assert text == (
        "<|im_start|>system\ncount<|im_end|>\n<|im_start|>user\nthe words of many<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_special_tokens_are_single_tokens_and_decode_to_nothing(chat: TokenizerText) -> None:
    start = chat.vocabulary.structural["<|im_start|>"]
    tokens = chat.render(HELLO)
    assert tokens[0] == start
    assert tokens.count(start) == 2
    assert chat.decode(tokens) == "user\nthe words of many\nassistant\n"


def test_the_end_of_a_turn_is_a_stop(chat: TokenizerText) -> None:
    assert chat.stops == (chat.vocabulary.structural["<|im_end|>"],)


def test_stops_of_the_generation_config_are_among_them(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / "generation_config.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps({**own, "eos_token_id": [2, 7]}))
    assert load_text(str(folder)).stops == (2, 7)
    path.unlink()
    assert load_text(str(folder)).stops == (2,)


def test_a_system_prompt_comes_first_or_takes_the_place_of_the_conversations(
    tiny_model: Path,
) -> None:
    text = load_text(str(tiny_model), system_prompt="add")
    plain = load_text(str(tiny_model))
    want = plain.render([{"role": "system", "content": "add"}, *HELLO])
    assert text.render(HELLO) == want
    assert text.render([{"role": "system", "content": "count"}, *HELLO]) == want
    later = [*HELLO, {"role": "system", "content": "count"}]
    assert len(text.render(later)) > len(want)  # only one that comes first is the conversation's


def test_an_empty_system_prompt_is_one(tiny_model: Path) -> None:
    text = load_text(str(tiny_model), system_prompt="")
    assert text.render(HELLO) != load_text(str(tiny_model)).render(HELLO)


def test_arguments_go_to_the_template() -> None:
    template = "{% if shout %}a{% else %}b{% endif %}{{ messages[0].content }}"
    quiet = TokenizerText(word_level(template=template))
    loud = TokenizerText(word_level(template=template), arguments={"shout": True})
    message = [{"role": "user", "content": "x"}]
    assert quiet.decode(quiet.render(message)).replace(" ", "") == "bx"
    assert loud.decode(loud.render(message)).replace(" ", "") == "ax"


@pytest.mark.parametrize("begin", [True, False])
def test_a_template_that_begins_the_text_is_not_begun_again(begin: bool) -> None:
    tokenizer = word_level(begin=begin, end=True, template="<s>{{ messages[0].content }}:")
    text = TokenizerText(tokenizer)
    assert shown(tokenizer, text.render([{"role": "user", "content": "hi"}])) == "<s>hi:"


@pytest.mark.parametrize(
    ("begin", "end", "want"),
    [
        (True, False, "<s>add:\n\none"),
        (True, True, "<s>add:\n\none"),
        (False, True, "add:\n\none"),
        (False, False, "add:\n\none"),
    ],
)
def test_a_base_model_gets_the_texts_alone_and_no_end(begin: bool, end: bool, want: str) -> None:
    tokenizer = word_level(begin=begin, end=end)
    text = TokenizerText(tokenizer, system_prompt="add:")
    assert shown(tokenizer, text.render([{"role": "user", "content": "one"}])) == want
    parts = [{"role": "user", "content": [{"type": "text", "text": "one"}]}]
    assert shown(tokenizer, text.render(parts)) == want


def test_an_empty_prompt_is_a_rows_error() -> None:
    with pytest.raises(RowError) as caught:
        TokenizerText(word_level()).render([{"role": "user", "content": ""}])
    assert caught.value.kind == "empty_prompt"


def test_messages_that_a_template_refuses_are_a_rows_error() -> None:
    template = "{{ raise_exception('no system here') }}"
    with pytest.raises(RowError, match="no system here"):
        TokenizerText(word_level(template=template)).render(HELLO)
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    for text in (TokenizerText(word_level()), TokenizerText(word_level(template=template))):
        with pytest.raises(RowError, match="other than text"):
            text.render(image)


def test_a_tokenizer_that_cannot_be_loaded_says_where_one_is_named(tmp_path: Path) -> None:
    for folder, content in (("none", None), ("broken", "{")):
        (tmp_path / folder).mkdir()
        if content is not None:
            (tmp_path / folder / "tokenizer.json").write_text(content)
            (tmp_path / folder / "tokenizer_config.json").write_text(
                '{"tokenizer_class": "PreTrainedTokenizerFast"}'
            )
        with pytest.raises(EngineUnavailable, match=r"parameters\.tokenizer"):
            load_text(str(tmp_path / folder))
