"""Completions that a student might sample, for property tests: text of every kind, cut into tokens
as its tokenizer would or otherwise, noise, structure, and characters cut in two."""

from __future__ import annotations

__all__ = ["completions", "recut", "texts", "token_bytes"]

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from spider_worker.distill.vocabulary import Vocabulary
from tests.support.tokenizers import TEXTS

_BITS = [
    *TEXTS.values(),
    *" \n\t.'019aZ",
    "\n\n",
    "  ",
    "e\u0301",
    "\u0301",
    "\u200d",
    "\U0001f469\u200d\U0001f467",
    "\u1112\u1161\u11ab",
    "<|im_end|>",
    "<think>",
    "▁",
    "\ufeff",
    "don't",
    " the",
    "12345",
]


def texts() -> st.SearchStrategy[str]:
    bits = st.one_of(st.sampled_from(_BITS), st.text(max_size=6))
    return st.lists(bits, max_size=5).map("".join)


def completions(vocabulary: Vocabulary) -> st.SearchStrategy[list[int]]:
    """Token ids, any of the vocabulary's among them."""
    noise = st.lists(st.integers(0, len(vocabulary.pieces) - 1), max_size=6)
    structure = st.sampled_from(sorted(vocabulary.structural.values())).map(lambda token: [token])
    written = texts().map(vocabulary.encode)
    cut = st.tuples(written, st.integers(1, 3)).map(lambda pair: pair[0][: -pair[1]])
    parts = st.one_of(written, written, recut(vocabulary), noise, cut, structure)
    return st.lists(parts, max_size=4).map(_joined)


def recut(vocabulary: Vocabulary) -> st.SearchStrategy[list[int]]:
    """A text in tokens that its tokenizer would not have chosen."""
    table = {
        piece: token
        for token, piece in enumerate(vocabulary.pieces)
        if piece and token not in vocabulary.texts
    }

    def cut(text: str, widths: Sequence[int]) -> list[int]:
        data, tokens, at = text.encode(), list[int](), 0
        while at < len(data):
            widest = widths[len(tokens) % len(widths)]
            width = next((w for w in range(widest, 0, -1) if data[at : at + w] in table), 0)
            if width:
                tokens.append(table[data[at : at + width]])
            at += max(width, 1)
        return tokens

    widths = st.lists(st.integers(1, 6), min_size=1, max_size=5)
    return st.tuples(texts(), widths).map(lambda pair: cut(*pair))


def token_bytes(vocabulary: Vocabulary, tokens: Any) -> bytes:
    """What tokens say, by another way than the code under test takes."""
    return b"".join(vocabulary.pieces[int(token)] or b"" for token in tokens)


def _joined(parts: Sequence[list[int]]) -> list[int]:
    return [token for part in parts for token in part]
