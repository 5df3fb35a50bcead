"""The bytes behind each token of a tokenizer, read from its own description (``tokenizer.json``).

Byte-level BPE writes bytes as letters; SentencePiece writes a space as ``▁`` and bytes that it has
no piece for as ``<0x0A>``; WordPiece marks what does *not* begin a word, and has a space before
everything else.
"""

from __future__ import annotations

__all__ = ["byte_tokens", "read_pieces"]

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK: Final = "▁"


def read_pieces(
    description: Mapping[str, Any], tokens: Mapping[int, str], added: Mapping[int, Any]
) -> list[bytes | None]:
    """Entry ``i`` is what token ``i`` stands for in running text; None where it stands for nothing
    (special, unknown, unused). ``tokens`` are all of the tokenizer's, ``added`` those of its
    ``added_tokens``."""
    read = _reader(description)
    unknown = _unknown(description["model"])
    marked = _marked(description)
    pieces: list[bytes | None] = [None] * (max(tokens, default=-1) + 1)
    for token, text in tokens.items():
        if token in added:
            # As it is written, and not in the letters of the model, but for the mark of a space:
            # decoders replace that one everywhere.
            shown = text.replace(_SPACE_MARK, " ") if marked else text
            pieces[token] = None if added[token]["special"] else shown.encode()
        elif token != unknown and text != unknown:
            pieces[token] = read(text)
    return pieces


def byte_tokens(description: Mapping[str, Any], tokens: Mapping[int, str]) -> frozenset[int]:
    """Tokens that stand for one byte for want of a better one. There may be another token of the
    same byte, and then it is the other that an encoder uses."""
    if not _has_fallback(description):
        return frozenset()
    return frozenset(token for token, text in tokens.items() if _BYTE_TOKEN.fullmatch(text))


def _reader(description: Mapping[str, Any]) -> Callable[[str], bytes]:
    """A function from a token's text to its bytes."""
    kinds = {part.get("type") for part in _parts(description)}
    if "ByteLevel" in kinds:
        return _from_byte_level
    if "WordPiece" in kinds | {description["model"].get("type")}:
        prefix = description["model"]["continuing_subword_prefix"]
        return functools.partial(_from_word_piece, prefix=prefix)
    return functools.partial(
        _from_text, marked=_marked(description), fallback=_has_fallback(description)
    )


def _from_byte_level(text: str) -> bytes:
    try:
        return text.translate(_byte_characters()).encode("latin-1")
    except UnicodeEncodeError:
        return text.encode()  # not in these letters


def _from_word_piece(text: str, *, prefix: str) -> bytes:
    return text[len(prefix) :].encode() if text.startswith(prefix) else b" " + text.encode()


def _from_text(text: str, *, marked: bool, fallback: bool) -> bytes:
    if fallback and (found := _BYTE_TOKEN.fullmatch(text)):
        return bytes([int(found[1], 16)])
    return (text.replace(_SPACE_MARK, " ") if marked else text).encode()


def _unknown(model: Mapping[str, Any]) -> str | int | None:
    """The token for what has none: its text, or in a Unigram model its id."""
    found = model.get("unk_token") if model.get("unk_id") is None else model["unk_id"]
    return found if isinstance(found, str | int) else None


def _has_fallback(description: Mapping[str, Any]) -> bool:
    kinds = {part.get("type") for part in _parts(description)}
    return "ByteFallback" in kinds or bool(description["model"].get("byte_fallback"))


def _marked(description: Mapping[str, Any]) -> bool:
    """Whether ``▁`` is a space."""
    if any(part.get("type") == "Metaspace" for part in _parts(description)):
        return True
    both = [description.get("decoder"), description.get("normalizer")]
    return _SPACE_MARK in json.dumps(both, ensure_ascii=False)


def _parts(description: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Decoder, pre-tokenizer and normaliser, with what they are made of."""
    waiting = [description.get(name) for name in ("decoder", "pre_tokenizer", "normalizer")]
    while waiting:
        part = waiting.pop()
        if part:
            yield part
            for name in ("decoders", "pretokenizers", "normalizers"):
                waiting += part.get(name) or []


@functools.cache
def _byte_characters() -> Mapping[int, str]:
    """The characters that byte-level BPE writes bytes as: printable Latin-1 bytes are themselves,
    the others are counted up from U+0100 (as GPT-2 began it), and stand for nothing themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **dict.fromkeys(others, "\uffff"),
        **{256 + number: chr(byte) for number, byte in enumerate(others)},
    }
