"""The bytes behind the token ids of a tokenizer, and which ids are structure.

A *piece* is the bytes that a token id stands for in running text. Special tokens stand for none:
they are structure, and named by their text (``<|im_end|>``). Added tokens that are not special
(``<think>`` in some models) are both: structure where the other model knows them too, text where
it does not.
"""

from __future__ import annotations

__all__ = ["Encoding", "Vocabulary", "build_vocabulary"]

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from spider_sdk.errors import FatalJobError

Indices = NDArray[np.int64]

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK: Final = "▁"
#: What a chat template is shown to learn how it closes a turn.
_MARK: Final = "xyzzy"
#: Texts on which the byte table must prove itself.
_PROBES: Final = (
    "The quick brown fox, 12345 times; don't stop!",
    "a",
    "  two  spaces\n\nand\ttabs ",
    "naïve café — Ünïcödé ŁŒ",
    "数学は楽しい。Привет, мир! שלום",
    "🙂👩‍👩‍👧 e\u0301",
    "def f(x):\n    return {'a': x**2}\n",
)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """A text in tokens: ``ids`` (M,), ``ends`` (M,) the offset in the text's UTF-8 bytes at which
    each token ends, non-decreasing."""

    ids: Indices
    ends: Indices


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """``pieces`` holds the bytes behind each id, None for a special, unused or unmappable one;
    ``lengths`` (V,) their lengths, 0 for None. ``structural`` are special and added tokens by
    text. ``stops`` end a turn; ``end_of_turn`` is the one that the chat template closes an
    assistant's turn with (None: the tokenizer knows none). ``exact``: the pieces of an encoding
    give the text back, byte for byte; if not, the encoder's own offsets tell where tokens lie.
    """

    name: str
    pieces: Sequence[bytes | None]
    structural: Mapping[str, int]
    special: frozenset[int]
    stops: frozenset[int]
    end_of_turn: int | None
    exact: bool
    tokenizer: Any = dataclasses.field(repr=False)

    @functools.cached_property
    def lengths(self) -> Indices:
        return np.array([len(piece or b"") for piece in self.pieces], dtype=np.int64)

    @functools.cached_property
    def texts(self) -> Mapping[int, str]:
        """Structural ids and what they are called."""
        return {token: text for text, token in self.structural.items()}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers with the same table of ids and bytes and the same structure."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(b"-" if piece is None else b"%d:%b" % (len(piece), piece))
        digest.update(json.dumps(sorted(self.structural.items())).encode())
        return digest.hexdigest()

    def same_ids(self, other: Vocabulary) -> bool:
        """Whether an id means the same in both."""
        return self.fingerprint == other.fingerprint

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text: nothing is added around it, and a special token that is
        written out in it is so many letters."""
        return list(self._encode(text).ids)

    def encode_ends(self, text: str) -> Encoding | None:
        """The text in tokens, and where they end; None where neither the pieces nor the encoder's
        offsets account for every byte. A leading space that the tokenizer makes up counts for
        no byte."""
        data = text.encode()
        found = self._encode(text)
        ids = np.array(found.ids, dtype=np.int64)
        if self.exact and not any(self.pieces[token] is None for token in found.ids):
            made = b"".join(self.pieces[token] or b"" for token in found.ids)
            if made == data:
                return Encoding(ids, np.cumsum(self.lengths[ids]))
            if made == b" " + data:
                return Encoding(ids, np.maximum(np.cumsum(self.lengths[ids]) - 1, 0))
        return _by_offsets(text, ids, found.offsets)

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """What ids without structure among them say."""
        return b"".join(self.pieces[token] or b"" for token in ids)

    def _encode(self, text: str) -> Any:
        backend = self.tokenizer.backend_tokenizer
        # On the shared backend: nobody else needs it otherwise while a run holds this tokenizer,
        # and prompts are rendered by templates, whose special tokens are set apart again below.
        before = backend.encode_special_tokens
        backend.encode_special_tokens = True
        try:
            return backend.encode(text, add_special_tokens=False)
        finally:
            backend.encode_special_tokens = before


def _by_offsets(text: str, ids: Indices, offsets: Sequence[tuple[int, int]]) -> Encoding | None:
    """Ends from the encoder's character offsets. What it left out (spaces between words, as
    WordPiece does) goes to the token behind it; what is left out at the end may only be
    space."""
    if not len(ids):
        return Encoding(ids, ids) if not text.strip() else None
    ends = np.array([end for _, end in offsets], dtype=np.int64)
    if (np.diff(ends) < 0).any() or text[ends[-1] :].strip():
        return None
    ends[-1] = len(text)
    widths = np.fromiter((len(char.encode()) for char in text), dtype=np.int64, count=len(text))
    return Encoding(ids, np.concatenate(([0], np.cumsum(widths)))[ends])


def build_vocabulary(tokenizer: Any, *, stops: Iterable[int] = ()) -> Vocabulary:
    """The vocabulary of a ``transformers`` tokenizer. ``stops`` are further ids that end a turn
    (``generation_config.eos_token_id``).

    Raises FatalJobError for a tokenizer whose tokens cannot be traced to bytes.
    """
    name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FatalJobError(
            f"tokenizer {name} ({type(tokenizer).__name__}) has no fast form, so its tokens cannot"
            " be traced to bytes; use a model with a tokenizer.json"
        )
    description = json.loads(backend.to_str())
    added = {int(one["id"]): one for one in description.get("added_tokens") or ()}
    special = frozenset(token for token, one in added.items() if one["special"])
    structural = {str(one["content"]): token for token, one in added.items()}
    pieces = _pieces(backend, description, added)
    eos = tokenizer.eos_token_id
    end = _end_of_turn(tokenizer, structural)
    turn_ends = {int(one) for one in (eos, end, *stops) if one is not None}
    made = Vocabulary(
        name=name,
        pieces=pieces,
        structural=structural,
        special=special,
        stops=frozenset(turn_ends),
        end_of_turn=end,
        exact=True,
        tokenizer=tokenizer,
    )
    made = dataclasses.replace(made, exact=_proves_exact(made))
    if not made.exact and all(made.encode_ends(probe) is None for probe in _PROBES):
        raise FatalJobError(
            f"the tokens of tokenizer {name} can be traced to bytes neither by its vocabulary nor"
            " by its encoder's offsets; choose a teacher or a student with another tokenizer"
        )
    return made


def _proves_exact(vocabulary: Vocabulary) -> bool:
    """Whether the pieces of what the tokenizer knows give the text back. A probe with a character
    that it does not know says nothing."""
    known = 0
    for probe in _PROBES:
        ids = vocabulary.encode(probe)
        if any(vocabulary.pieces[token] is None for token in ids):
            continue
        known += 1
        if vocabulary.bytes_of(ids).removeprefix(b" ") != probe.encode().removeprefix(b" "):
            return False
    # A tokenizer of a few characters (the demo's) knows none of the probes: its pieces are the
    # characters themselves, unless it is of a kind that is known to change text.
    return known > 0 or type(vocabulary.tokenizer.backend_tokenizer.decoder).__name__ != "WordPiece"


def _pieces(
    backend: Any, description: Mapping[str, Any], added: Mapping[int, Any]
) -> list[bytes | None]:
    texts = {token: text for text, token in backend.get_vocab(with_added_tokens=True).items()}
    kinds = _kinds(description)
    byte_level = "ByteLevel" in kinds
    fallback = "ByteFallback" in kinds or bool(description["model"].get("byte_fallback"))
    marked = "Metaspace" in kinds or _SPACE_MARK in json.dumps(
        [description.get("decoder"), description.get("normalizer")], ensure_ascii=False
    )
    table = _byte_characters()
    pieces: list[bytes | None] = [None] * (max(texts, default=-1) + 1)
    for token, text in texts.items():
        if token in added:
            pieces[token] = None if added[token]["special"] else text.encode()
        elif byte_level:
            known = all(char in table for char in text)
            pieces[token] = bytes(table[char] for char in text) if known else text.encode()
        elif fallback and (found := _BYTE_TOKEN.fullmatch(text)):
            pieces[token] = bytes([int(found[1], 16)])
        elif text == description["model"].get("unk_token"):
            pieces[token] = None
        else:
            pieces[token] = (text.replace(_SPACE_MARK, " ") if marked else text).encode()
    return pieces


def _kinds(description: Mapping[str, Any]) -> set[str]:
    """The types of the decoder and the pre-tokenizer, with what they are made of."""
    found: set[str] = set()
    for part in ("decoder", "pre_tokenizer"):
        one = description.get(part) or {}
        inner = one.get("decoders") or one.get("pretokenizers") or []
        found |= {str(item.get("type")) for item in (one, *inner)}
    return found


@functools.cache
def _byte_characters() -> Mapping[str, int]:
    """The characters that byte-level BPE writes bytes as: printable Latin-1 bytes are themselves,
    the others are counted up from U+0100 (as GPT-2 began it)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}


def _end_of_turn(tokenizer: Any, structural: Mapping[str, int]) -> int | None:
    """The first structural token that the chat template writes behind an assistant's words, else
    the tokenizer's end of sequence."""
    eos: int | None = tokenizer.eos_token_id
    if not getattr(tokenizer, "chat_template", None):
        return eos
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False)
    except Exception:  # noqa: BLE001 (a template is a program of the model's, which may refuse)
        return eos
    _, found, behind = str(text).rpartition(_MARK)
    if not found:
        return eos
    places = [
        (behind.find(mark), -len(mark), token)
        for mark, token in structural.items()
        if mark and mark in behind
    ]
    return min(places)[2] if places else eos
