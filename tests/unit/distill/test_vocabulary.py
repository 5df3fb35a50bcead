"""Vocabularies of tokenizers, and what encoding text with them must not do."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from spider_sdk.errors import FatalJobError
from spider_worker.distill.vocabulary import Vocabulary, build_vocabulary
from tests.support.tokenizers import ALL, REAL, TRAINED, load, vocabulary

SPACELESS = ("tekken", "anthropic", "cl100k", "unigram", "byte-level", "byte-level nfc")
WITH_FALLBACK = ("mistral-v1", "mistral-v3", "metaspace", "metaspace always", "prepend", "unigram")
LONG = "The quick brown fox jumps over the lazy dog, again and again. " * 40


def changed(name: str, **attributes: Any) -> Any:
    """A copy of a tokenizer, to be changed."""
    tokenizer = copy.deepcopy(load(name))
    for attribute, value in attributes.items():
        setattr(tokenizer, attribute, value)
    return tokenizer


def words(known: Vocabulary, text: str, **options: bool) -> list[bytes | None]:
    found = known.encode_ends(text, **options)
    assert found is not None
    return [known.pieces[token] for token in found.ids]


@pytest.mark.parametrize("name", ALL)
def test_every_kind_of_tokenizer_is_traced(name: str) -> None:
    known = vocabulary(name)
    assert known.exact
    assert known.spaced == (name not in SPACELESS)
    assert known.tidies == (name in ("bert", "word-piece"))
    assert len(known.fallbacks) == (256 if name in WITH_FALLBACK else 0)


@pytest.mark.parametrize("name", ALL)
def test_a_special_token_that_is_typed_is_so_many_letters(name: str) -> None:
    known = vocabulary(name)
    names = [known.texts[token] for token in sorted(known.stops | known.special)[:20]]
    for typed in names:
        if typed not in ("<unk>", "[UNK]"):  # which encoding may give for what it does not know
            assert known.structural[typed] not in known.encode(f"He typed {typed}.")


@pytest.mark.parametrize("name", WITH_FALLBACK)
def test_a_byte_token_that_is_typed_is_so_many_letters(name: str) -> None:
    known = vocabulary(name)
    (newline,) = (n for n in known.fallbacks if known.pieces[n] == b"\n")
    assert newline not in known.encode("He typed <0x0A>.")
    assert known.bytes_of(known.encode("He typed <0x0A>.")).strip() == b"He typed <0x0A>."


def test_an_end_of_turn_that_is_not_special_is_letters_too() -> None:
    tokenizer = changed("byte-level", eos_token="</think>")
    known = build_vocabulary(tokenizer)
    end = known.structural["</think>"]
    assert end in known.stops
    assert end not in known.special
    assert end not in known.encode("a </think> b")
    assert known.structural["<think>"] in known.encode("a <think> b")


@pytest.mark.parametrize("name", ["bert", *TRAINED])
def test_nothing_is_cut_padded_or_added(name: str) -> None:
    tokenizer = changed(name)
    tokenizer.backend_tokenizer.enable_truncation(16)
    tokenizer.backend_tokenizer.enable_padding(length=16)
    found = build_vocabulary(tokenizer).encode_ends(LONG)
    assert found is not None
    assert found.ids.tolist() == vocabulary(name).encode(LONG)
    assert found.ends[-1] == len(LONG)
    assert found.ids.size > 400


def test_the_tokenizer_itself_is_left_as_it_was() -> None:
    tokenizer = load("metaspace")
    before = tokenizer.backend_tokenizer.to_str()
    known = vocabulary("metaspace")
    known.encode("[/INST] typed")
    assert tokenizer.backend_tokenizer.to_str() == before
    assert not tokenizer.backend_tokenizer.encode_special_tokens
    assert known.structural["[/INST]"] in tokenizer.encode("[/INST]")


def test_ends_of_a_token_that_ends_in_space_are_whole() -> None:
    """Post-processors trim offsets: where a rewritten text has its ends from offsets, a token
    "a " would seem to end before its space."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [*pre_tokenizers.ByteLevel.alphabet(), "aĠ"]
    backend = Tokenizer(models.BPE({text: n for n, text in enumerate(letters)}, [("a", "Ġ")]))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    known = build_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend))
    found = known.encode_ends("e\u0301a b")
    assert found is not None
    assert not found.literal
    assert words(known, "e\u0301a b") == [b"\xc3", b"\xa9", b"a ", b"b"]
    assert found.ends.tolist() == [3, 3, 5, 6]


@pytest.mark.parametrize("name", ["byte-level nfc", "unigram", "anthropic"])
@pytest.mark.parametrize(
    "text",
    ["cafe\u0301 x", "o\u0323\u0301 x", "\u1112\u1161\u11ab x", "\u09c7\u09be x", "ﬁne x"],
    ids=["accent", "two marks", "hangul", "vowel", "ligature"],
)
def test_a_character_that_is_rewritten_is_not_cut(name: str, text: str) -> None:
    """What the tokens up to an end say must be what the text up to it becomes."""
    known = vocabulary(name)
    found = known.encode_ends(text)
    assert found is not None
    normalize = known.encoders[0].normalizer.normalize_str
    for end in sorted(set(found.ends.tolist())):
        last = int(np.searchsorted(found.ends, end, side="right"))
        said = known.bytes_of(found.ids[:last].tolist()).decode()
        before = text.encode()[:end].decode()
        assert said == normalize(before).replace("▁", " ")


def test_what_an_encoder_leaves_out_goes_to_the_token_behind_it_and_at_the_end_to_the_last() -> (
    None
):
    found = vocabulary("bert").encode_ends("  hello \u200d  world\u200d ")
    assert found is not None
    assert found.ends.tolist() == [7, 22]


def test_a_character_that_is_not_known_is_covered_by_the_unknown_token() -> None:
    known = vocabulary("word-piece")
    found = known.encode_ends("a ☃ b")
    assert found is not None
    assert [known.pieces[token] for token in found.ids] == [b" a", None, b" b"]
    assert found.ends.tolist() == [1, 5, 7]


def test_ends_that_cannot_be_right_are_not_given() -> None:
    """A model without an unknown token leaves out what it does not know, and counts on from the
    token before it."""
    known = build_vocabulary(letters_only())
    assert known.encode("数a") == known.encode("a")
    assert known.encode_ends("数a") is None
    behind = known.encode_ends("a数")
    assert behind is not None
    assert behind.ends.tolist() == [4]
    assert not behind.literal


def letters_only() -> Any:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("name", "start", "middle"),
    [
        ("metaspace", [b" a"], [b"a"]),
        ("metaspace always", [b" a"], [b" a"]),
        ("prepend", [b" a"], [b" a"]),
        ("unigram", [b"a"], [b"a"]),
        ("byte-level", [b"a"], [b"a"]),
    ],
)
def test_a_tokenizers_own_space_stands_where_it_puts_one(
    name: str, start: list[bytes], middle: list[bytes]
) -> None:
    known = vocabulary(name)
    assert words(known, "a") == start
    assert words(known, "a", begins=False) == middle
    found = known.encode_ends("a")
    assert found is not None
    assert found.spaced == (start == [b" a"])
    assert found.ends.tolist() == [1]


def test_a_space_of_its_own_alone_is_a_token_without_bytes() -> None:
    known = vocabulary("prepend")
    assert words(known, "!x") == [b" ", b"!", b"x"]
    found = known.encode_ends("!x")
    assert found is not None
    assert found.ends.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ALL)
def test_of_the_same_tokenizer_ids_mean_the_same(name: str) -> None:
    assert vocabulary(name).same_ids(build_vocabulary(changed(name)))


def test_of_others_they_do_not() -> None:
    more = changed("byte-level")
    more.add_tokens(["<more>"])
    other = changed("byte-level")
    other.add_special_tokens({"additional_special_tokens": ["<other>"]})
    known = [build_vocabulary(more), build_vocabulary(other)]
    known += [vocabulary(name) for name in ("byte-level", "byte-level nfc", "mistral-v3")]
    same = [one.same_ids(two) for one in known for two in known]
    assert same == np.eye(5, dtype=bool).ravel().tolist()


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("byte-level", "<|im_end|>"),
        ("metaspace", "</s>"),
        ("unigram", "<end_of_turn>"),
        ("tekken", "</s>"),
        ("word-piece", "[SEP]"),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes(name: str, end: str) -> None:
    known = vocabulary(name)
    assert known.end_of_turn == known.structural[end]
    assert known.end_of_turn in known.stops


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{{ messages[0].content }}", "xyzzy plain", None]
)
def test_a_template_that_shows_no_end_leaves_the_end_of_sequence(template: str | None) -> None:
    known = build_vocabulary(changed("byte-level", chat_template=template))
    assert known.end_of_turn == known.structural["<|im_end|>"]


def test_further_stops_end_a_turn_and_are_not_its_usual_end() -> None:
    known = build_vocabulary(load("byte-level"), stops=[0])
    assert known.stops == {0, known.structural["<|im_end|>"]}
    assert known.end_of_turn != 0


def test_a_delimiter_is_found_under_its_other_names() -> None:
    qwen, mistral = vocabulary("byte-level"), vocabulary("metaspace")
    assert mistral.structure("<think>") == mistral.structural["[THINK]"]
    assert qwen.structure("[/THINK]") == qwen.structural["</think>"]
    assert qwen.structure("</think>") == qwen.structural["</think>"]
    assert mistral.structure("<|im_end|>") is None
    assert mistral.structure("<tool_call>") == mistral.structural["[TOOL_CALLS]"]
    assert qwen.structure("<|/tool_call|>") == qwen.structural["</tool_call>"]
    assert qwen.structure("<｜tool▁calls▁begin｜>") is None  # of a list


def test_of_a_pair_that_a_model_has_one_half_of_the_other_is_no_text_to_it() -> None:
    qwen, mistral = vocabulary("byte-level"), vocabulary("metaspace")
    assert mistral.marks("</tool_call>")
    assert mistral.structure("</tool_call>") is None
    assert mistral.marks("[TOOL_CALLS]")
    assert mistral.marks("<s>")
    assert not mistral.marks("<tool_response>")  # it has neither
    assert not mistral.marks("<|im_end|>")
    assert qwen.marks("[TOOL_CALLS]")


def test_a_tokenizer_without_a_fast_form_is_refused() -> None:
    class Slow:
        name_or_path = "somebody/slow"

    with pytest.raises(FatalJobError, match=r"somebody/slow \(Slow\) has no fast form"):
        build_vocabulary(Slow())


class Nowhere:
    """A tokenizer and its backend in one, that says of all its tokens that they have no length."""

    name_or_path = "somebody/nowhere"
    eos_token_id = None
    ids = (0, 0)
    offsets = ((0, 0), (0, 0))

    @property
    def backend_tokenizer(self) -> Nowhere:
        return self

    @classmethod
    def from_str(cls, _: str) -> Nowhere:
        return cls()

    def to_str(self) -> str:
        return '{"model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}}'

    def get_vocab(self, **_: bool) -> dict[str, int]:
        return {"?": 0}

    def encode(self, _: str, **__: bool) -> Nowhere:
        return self


def test_a_tokenizer_whose_tokens_lie_nowhere_is_refused() -> None:
    with pytest.raises(FatalJobError, match="somebody/nowhere can be traced to bytes neither"):
        build_vocabulary(Nowhere())


def test_all_real_tokenizers_are_there() -> None:
    """So that a package that is gone is noticed, and not only skipped."""
    assert all(load(name) is not None for name in REAL)
