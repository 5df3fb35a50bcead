"""The bytes behind the token ids of a tokenizer, and which ids are structure.

A *piece* is the bytes that a token id stands for in running text. Special tokens stand for none:
they are structure, and named by their text (``<|im_end|>``). Added tokens that are not special
(``<think>`` in some models) are both: structure where the other model knows them too, text where
it does not, since there are models that spell them out.
"""

from __future__ import annotations

__all__ = ["Encoding", "Vocabulary", "build_vocabulary"]

import dataclasses
import functools
import hashlib
import itertools
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from spider_sdk.errors import FatalJobError
from spider_worker.distill.encoders import text_encoders
from spider_worker.distill.pieces import byte_tokens, read_pieces

Indices = NDArray[np.int64]

#: Delimiters that mean the same to models that call them differently, as pairs of what begins and
#: what ends thinking, a call of a tool and its result. Those that stand around a list of calls are
#: not among them: a second call would begin with what that model never writes twice.
_SYNONYMS: Final = (
    (
        ("<think>", "[THINK]", "◁think▷", "<|START_THINKING|>", "<seed:think>"),
        ("</think>", "[/THINK]", "◁/think▷", "<|END_THINKING|>", "</seed:think>"),
    ),
    (
        ("<tool_call>", "[TOOL_CALLS]", "<|tool_call|>", "<seed:tool_call>"),
        ("</tool_call>", "<|/tool_call|>", "</seed:tool_call>"),
    ),
    (
        ("<tool_response>", "[TOOL_RESULTS]", "<|tool_response|>", "<|START_TOOL_RESULT|>"),
        ("</tool_response>", "[/TOOL_RESULTS]", "<|END_TOOL_RESULT|>"),
    ),
)
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
    each token ends, non-decreasing. ``literal``: the pieces of ``ids`` are the text, but for a
    space before it, ``spaced``, that the tokenizer made up and that counts for no byte. What is
    not literal has its ends from the encoder's own account of where its tokens come from."""

    ids: Indices
    ends: Indices
    literal: bool
    spaced: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """``pieces`` holds the bytes behind each id, None for a special, unused or unmappable one;
    ``lengths`` (V,) their lengths, 0 for None. ``structural`` are special and added tokens by
    text. ``stops`` end a turn; ``end_of_turn`` is the one that the chat template closes an
    assistant's turn with (None: the tokenizer knows none). ``exact``: decoding tokens gives their
    pieces. ``tidies``: then it takes spaces away, as before a full stop (WordPiece). ``spaced``: a
    text gets a space of the tokenizer's own before it. ``fallbacks`` stand for one byte for want
    of a better token.
    """

    name: str
    pieces: Sequence[bytes | None]
    structural: Mapping[str, int]
    special: frozenset[int]
    fallbacks: frozenset[int]
    stops: frozenset[int]
    end_of_turn: int | None
    exact: bool
    tidies: bool
    spaced: bool
    tokenizer: Any = dataclasses.field(repr=False)
    encoders: tuple[Any, Any] = dataclasses.field(repr=False)  #: of a text's start, of its middle

    @functools.cached_property
    def lengths(self) -> Indices:
        lengths = (len(piece or b"") for piece in self.pieces)
        return np.fromiter(lengths, dtype=np.int64, count=len(self.pieces))

    @functools.cached_property
    def textual(self) -> NDArray[np.bool_]:
        """(V,): which ids have bytes."""
        found = (piece is not None for piece in self.pieces)
        return np.fromiter(found, dtype=bool, count=len(self.pieces))

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

    def structure(self, text: str) -> int | None:
        """The structural token of that name, or of another name for the same delimiter."""
        names = next((names for pair in _SYNONYMS for names in pair if text in names), ())
        return next(
            (self.structural[name] for name in (text, *names) if name in self.structural), None
        )

    def marks(self, text: str) -> bool:
        """Whether the model has a token for that delimiter, or for the other half of its pair
        alone (a call of Mistral's ends without a mark): it is no text to the model then."""
        pair = next((pair for pair in _SYNONYMS if any(text in names for names in pair)), ())
        return text in self.structural or any(
            name in self.structural for names in pair for name in names
        )

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """The ids of ordinary text: nothing is added around it, and a special token that is
        written out in it is so many letters. ``begins`` False: something stands before the text,
        so a tokenizer that has a space of its own before a whole text alone has none here."""
        return list(self._encode(text, begins).ids)

    def encode_ends(self, text: str, *, begins: bool = True) -> Encoding | None:
        """The text in tokens, and where they end; None where neither the pieces nor the encoder's
        offsets account for every byte."""
        data = text.encode()
        found = self._encode(text, begins)
        ids = np.array(found.ids, dtype=np.int64)
        if self.textual[ids].all():
            said = self.bytes_of(found.ids)
            if said == data:
                return Encoding(ids, np.cumsum(self.lengths[ids]), literal=True, spaced=False)
            if len(said) == len(data) + 1 and said[:1] == b" " and said[1:] == data:
                ends = np.maximum(np.cumsum(self.lengths[ids]) - 1, 0)
                return Encoding(ids, ends, literal=True, spaced=True)
        return self._by_offsets(text, ids, found.offsets, begins)

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """What ids say; structure says nothing."""
        return b"".join(map(self._said.__getitem__, ids))

    @functools.cached_property
    def _said(self) -> list[bytes]:
        return [piece or b"" for piece in self.pieces]

    def decode(self, ids: Sequence[int]) -> str:
        """The text that the tokenizer's decoder makes of them, tidied where it does that."""
        return str(self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False))

    def _encode(self, text: str, begins: bool) -> Any:
        return self.encoders[0 if begins else 1].encode(text, add_special_tokens=False)

    def _by_offsets(
        self, text: str, ids: Indices, offsets: Sequence[tuple[int, int]], begins: bool
    ) -> Encoding | None:
        """Ends from the encoder's character offsets. What it left out (spaces between words, as
        WordPiece does, or joiners of emoji) goes to the token behind it, at the end to the last
        one, if it is nothing to the encoder by itself as well."""
        flat = np.fromiter(itertools.chain.from_iterable(offsets), dtype=np.int64)
        starts, ends = flat[::2], flat[1::2]
        rest = text[ends[-1] :] if len(ends) else text
        if rest.strip() and self._encode(rest, begins).ids:
            return None
        ends[-1:] = len(text)
        letters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        # Nothing in ASCII is a part of what stands before it.
        for place in np.flatnonzero(letters[np.minimum(ends, len(text) - 1)] >= 0x80):
            ends[place] = _behind_joined(text, int(ends[place]))
        # Where the next token begins before this one's end, both are parts of something that
        # was rewritten, and only where it ends is a place that the text has, too.
        for place in np.flatnonzero(starts[1:] < ends[:-1])[::-1]:
            ends[place] = ends[place + 1]
        if (np.diff(ends) < 0).any():
            return None
        first_bytes = (np.frombuffer(text.encode(), dtype=np.uint8) & 0xC0) != 0x80
        places = np.append(np.flatnonzero(first_bytes), len(first_bytes))
        return Encoding(ids, places[ends], literal=False, spaced=False)


def _behind_joined(text: str, place: int) -> int:
    """The first place from there on that is not inside a character of several code points, such as
    a letter and its accent: encoders that write them as one lay it where the first of them was."""
    while 0 < place < len(text):
        # A Hangul syllable has three parts, the longest of what joins without a combining class.
        before, here = text[max(place - 3, 0) : place], text[place]
        apart = unicodedata.normalize("NFC", before) + unicodedata.normalize("NFC", here)
        if not unicodedata.combining(here) and unicodedata.normalize("NFC", before + here) == apart:
            break
        place += 1
    return place


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
    tokens = {token: text for text, token in backend.get_vocab(with_added_tokens=True).items()}
    structural = {str(one["content"]): token for token, one in added.items()}
    eos = tokenizer.eos_token_id
    end = _end_of_turn(tokenizer, structural)
    turn_ends = frozenset(int(one) for one in (eos, end, *stops) if one is not None)
    special = frozenset(token for token, one in added.items() if one["special"])
    fallbacks = byte_tokens(description, tokens)
    made = Vocabulary(
        name=name,
        pieces=read_pieces(description, tokens, added),
        structural=structural,
        special=special,
        fallbacks=fallbacks,
        stops=turn_ends,
        end_of_turn=end,
        exact=True,
        tidies=bool((description.get("decoder") or {}).get("cleanup")),
        spaced=False,
        tokenizer=tokenizer,
        encoders=text_encoders(backend, description, special | turn_ends, fallbacks),
    )
    if all(made.encode_ends(probe) is None for probe in _PROBES):
        raise FatalJobError(
            f"the tokens of tokenizer {name} can be traced to bytes neither by its vocabulary nor"
            " by its encoder's offsets; choose a teacher or a student with another tokenizer"
        )
    return dataclasses.replace(made, exact=_proves_exact(made), spaced=_makes_space(made))


def _proves_exact(vocabulary: Vocabulary) -> bool:
    """Whether decoding gives the pieces, but for a space before them. It is the decoder that is
    asked: an encoder may write an accent otherwise than it was given, and its pieces are none
    the worse."""
    for probe in _PROBES:
        ids = vocabulary.encode(probe)
        if any(vocabulary.pieces[token] is None for token in ids):
            continue  # a character that it does not know
        said = vocabulary.bytes_of(ids).decode(errors="replace")
        shown = vocabulary.encoders[0].decode(ids, skip_special_tokens=False)
        if said != shown and said != f" {shown}":
            return False
    return True


def _makes_space(vocabulary: Vocabulary) -> bool:
    found = [vocabulary.encode_ends(probe) for probe in _PROBES]
    return any(one is not None and one.spaced for one in found)


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
        if mark.strip() and mark in behind
    ]
    return min(places)[2] if places else eos
