"""A student's completion as the teacher's token ids, and the spans between the two.

The completion is cut into segments: text, structure (thinking and tool delimiters), the stop. Text
goes over byte by byte; structure and the stop go over as what they mean, and no special token is
spelt out: a student whose ``<|im_end|>`` is scored as eleven letters is punished for stopping. A
segment that cannot be mapped is left out alone, with a reason, and moves nothing that comes after
it.
"""

from __future__ import annotations

__all__ = ["Kind", "Translation", "Translator"]

import collections
import dataclasses
import enum
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from spider_worker.distill.alignment import Indices, Spans, align
from spider_worker.distill.vocabulary import Encoding, Vocabulary

#: What ``surrogateescape`` makes of bytes that are no UTF-8; nothing else decodes to it.
_BAD: Final = re.compile("[\udc80-\udcff]+")


class Kind(enum.IntEnum):
    """What a span is made of."""

    TEXT = 0
    STRUCTURE = 1
    STOP = 2


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Translation:
    """``teacher_tokens`` (M,) continue the teacher's prompt. ``spans`` index the completion's
    tokens (N,) and these; ``kinds`` (C,) says what each is. ``level`` (C,): where the span begins,
    both models are about to write the same byte, so that their distributions can be compared
    (not so where one of them has yet to write a space that it made up). ``dropped`` counts student
    tokens in no span, by reason; ``coverage`` is the share of the others (1 of an empty
    completion)."""

    teacher_tokens: Indices
    spans: Spans
    kinds: NDArray[np.int64]
    level: NDArray[np.bool_]
    dropped: Mapping[str, int]
    coverage: float

    @property
    def longest_span(self) -> int:
        """In tokens, of whichever side has more."""
        widths = [
            self.spans.student_end - self.spans.student_begin,
            self.spans.teacher_end - self.spans.teacher_begin,
        ]
        return max((int(width.max()) for width in widths if width.size), default=0)


@dataclasses.dataclass
class _Work:
    """What has been translated so far."""

    tokens: list[Indices] = dataclasses.field(default_factory=list)
    count: int = 0
    spans: list[Spans] = dataclasses.field(default_factory=list)
    kinds: list[NDArray[np.int64]] = dataclasses.field(default_factory=list)
    level: list[NDArray[np.bool_]] = dataclasses.field(default_factory=list)
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(
        self,
        tokens: Indices,
        spans: Spans | None,
        kind: Kind,
        level: NDArray[np.bool_] | None = None,
    ) -> None:
        """``spans`` count teacher tokens from the first of ``tokens``; None: in no span. ``level``
        None: all are."""
        if spans is not None and len(spans):
            self.spans.append(spans.moved(0, self.count))
            self.kinds.append(np.full(len(spans), int(kind)))
            self.level.append(np.ones(len(spans), dtype=bool) if level is None else level)
        self.tokens.append(tokens)
        self.count += len(tokens)

    def add_one(self, place: int, token: int, kind: Kind) -> None:
        """The student's token at ``place`` is the teacher's ``token``."""
        self.add(np.array([token]), Spans.single(place, place + 1, 0, 1), kind)

    def finished(self, count: int) -> Translation:
        """Of a completion of ``count`` tokens."""
        spans = Spans.joined(self.spans)
        nothing = np.zeros(0, dtype=np.int64)
        return Translation(
            teacher_tokens=np.concatenate([*self.tokens, nothing]),
            spans=spans,
            kinds=np.concatenate([*self.kinds, nothing]),
            level=np.concatenate([*self.level, nothing.astype(bool)]),
            dropped=dict(self.dropped),
            coverage=spans.covered / count if count else 1.0,
        )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Stretch:
    """Student tokens of text: ``ends`` (n,) in the bytes ``data``, the first token ``begin`` in
    the completion. The text proper begins at byte ``skip``: before it stands a space that the
    tokenizer makes up. ``literal``: the bytes are those of the tokens' pieces."""

    begin: int
    data: bytes
    ends: Indices
    skip: int
    literal: bool

    def window(self, start: int, stop: int) -> tuple[int, int]:
        """The range of tokens that end in these bytes; those without bytes join the token before
        them, or at the very beginning whatever comes."""
        low = 0 if start == self.skip else int(np.searchsorted(self.ends, start, side="right"))
        return low, int(np.searchsorted(self.ends, stop, side="right"))


class Translator:
    """From one vocabulary to another."""

    def __init__(self, student: Vocabulary, teacher: Vocabulary) -> None:
        self._student = student
        self._teacher = teacher
        self._same = student.same_ids(teacher)
        self._structure = _structure(student, teacher)
        self._textual = student.textual.copy()
        self._textual[list(self._structure)] = False

    def translate(self, ids: Sequence[int], *, stopped: bool) -> Translation:
        """``ids`` (N,) as sampled. ``stopped``: the last is a stop token, which becomes the
        teacher's end of turn; else the completion was cut and has no stop to compare."""
        tokens = np.asarray(ids, dtype=np.int64)
        work = _Work()
        body = len(tokens) - 1 if stopped and len(tokens) else len(tokens)
        if self._same:
            self._identical(work, tokens[:body])
        else:
            for begin, end, structural in self._segments(tokens[:body]):
                if structural:
                    self._structural(work, begin, int(tokens[begin]))
                else:
                    self._text(work, tokens[begin:end], begin)
        if body < len(tokens):
            self._stop(work, body, int(tokens[body]))
        return work.finished(len(tokens))

    def _identical(self, work: _Work, tokens: Indices) -> None:
        """Ids mean the same to both. An output layer may be wider than the vocabulary, and to
        another width: what is beyond it means nothing."""
        known = np.flatnonzero(tokens < len(self._student.pieces))
        if len(known) < len(tokens):
            work.dropped["unknown token"] += len(tokens) - len(known)
        places = np.arange(len(known), dtype=np.int64)
        work.add(tokens[known], Spans(known, known + 1, places, places + 1), Kind.TEXT)

    def _segments(self, tokens: Indices) -> Iterator[tuple[int, int, bool]]:
        """Ranges of text between single tokens of structure."""
        known = tokens < len(self._textual)
        textual = known & self._textual[np.where(known, tokens, 0)]
        begin = 0
        for place in np.flatnonzero(~textual).tolist():
            if place > begin:
                yield begin, place, False
            yield place, place + 1, True
            begin = place + 1
        if begin < len(tokens):
            yield begin, len(tokens), False

    def _structural(self, work: _Work, place: int, token: int) -> None:
        mapped = self._structure.get(token)
        if mapped is None:
            name = self._student.texts.get(token)
            work.dropped["unknown token" if name is None else f"no {name} in the teacher"] += 1
            return
        work.add_one(place, mapped, Kind.STRUCTURE)

    def _stop(self, work: _Work, place: int, token: int) -> None:
        teacher = self._teacher
        mapped = token if self._same and token in teacher.stops else teacher.end_of_turn
        if mapped is None:
            work.dropped["the teacher has no end of turn"] += 1
            return
        work.add_one(place, mapped, Kind.STOP)

    def _text(self, work: _Work, tokens: Indices, begin: int) -> None:
        """A stretch of text, by its bytes. Bytes that are no UTF-8 (a character that was cut, or
        noise) are left out with the tokens that touch them."""
        stretch = self._stretch(tokens, begin)
        if stretch is None:
            work.dropped["tokens of the student without known bytes"] += len(tokens)
            return
        covered = changed = 0
        for start, text in _texts(stretch.data, stretch.skip):
            if text is None:
                # So that the teacher sees that something stood here.
                work.add(self._replacement, None, Kind.TEXT)
                continue
            found = self._run(work, stretch, start, text)
            covered += max(found, 0)
            changed += max(-found, 0)
        if changed:
            work.dropped["text that the teacher's tokenizer changes"] += changed
        if lost := len(tokens) - covered - changed:
            work.dropped["no valid UTF-8"] += lost

    def _stretch(self, tokens: Indices, begin: int) -> _Stretch | None:
        """What a text at ``begin`` of the completion says; None if that cannot be told."""
        student, ids = self._student, tokens.tolist()
        if not student.exact:
            return None
        data, ends = student.bytes_of(ids), np.cumsum(student.lengths[tokens])
        if student.tidies:
            text = student.decode(ids).encode()
            found = _ends_of_letters(data, ends, text)
            if found is not None:  # else it changed letters, too
                return _Stretch(begin, text, found, 0, literal=False)
        # A completion's first space is no part of the text if its tokenizer begins texts with one.
        skip = int(student.spaced and begin == 0 and data[:1] == b" " and len(data) > 1)
        return _Stretch(begin, data, np.maximum(ends, skip), skip, literal=True)

    def _run(self, work: _Work, stretch: _Stretch, start: int, text: str) -> int:
        """Valid text that begins at byte ``start``; the number of student tokens that it covers,
        or less than 0 if the teacher cannot say it: minus the number that say nothing else."""
        first = work.count == 0 and start == stretch.skip and stretch.begin == 0
        skip = stretch.skip if first else 0
        low, high = stretch.window(start, start + len(text.encode()))
        found = self._teacher.encode_ends(text, begins=first)
        if skip and found is not None and (whole := self._with_space(text, found)) is not None:
            found, start, skip = whole, 0, 0
        if found is None or not len(found.ids):
            ids = self._teacher.encode(text, begins=first)
            work.add(np.array(ids, dtype=np.int64), None, Kind.TEXT)
            return low - high
        spans = align(
            stretch.ends[low:high],
            found.ends + start,
            student_start=int(stretch.ends[low - 1]) if low else min(start, stretch.skip),
            teacher_start=start,
        ).moved(stretch.begin + low, 0)
        level = np.full(len(spans), found.literal and stretch.literal)
        if found.spaced != bool(skip):
            level[:1] = False
        work.add(found.ids, spans, Kind.TEXT, level)
        return spans.covered

    def _with_space(self, text: str, found: Encoding) -> Encoding | None:
        """A text behind the space that the student's tokenizer makes up, if the teacher's does so
        too: then it is a byte that both write. ``found`` is the text itself."""
        teacher = self._teacher
        if found.spaced:
            ends = np.cumsum(teacher.lengths[found.ids])
            return dataclasses.replace(found, ends=ends, spaced=False)
        # Some make up a space, but none before a space.
        whole = teacher.encode_ends(f" {text}") if teacher.spaced else None
        return whole if whole is not None and whole.literal and not whole.spaced else None

    @functools.cached_property
    def _replacement(self) -> Indices:
        return np.array(self._teacher.encode("\ufffd", begins=False), dtype=np.int64)


def _texts(data: bytes, start: int) -> Iterator[tuple[int, str | None]]:
    """The valid stretches of UTF-8 from ``start`` on, each with the byte that it begins at, and
    None for what stands between them."""
    text = data[start:].decode(errors="surrogateescape")
    at = 0
    for bad in _BAD.finditer(text):
        if good := text[at : bad.start()]:
            yield start, good
            start += len(good.encode())
        yield start, None
        start += bad.end() - bad.start()
        at = bad.end()
    if at < len(text):
        yield start, text[at:]


def _ends_of_letters(data: bytes, ends: Indices, text: bytes) -> Indices | None:
    """Where tokens that end at ``ends`` of ``data`` end in ``text``, the same but for spaces; None
    if it is not."""
    if data.replace(b" ", b"") != text.replace(b" ", b""):
        return None
    before = np.concatenate(([0], np.cumsum(np.frombuffer(data, dtype=np.uint8) != ord(" "))))[ends]
    places = np.flatnonzero(np.frombuffer(text, dtype=np.uint8) != ord(" ")) + 1
    found: Indices = np.concatenate(([0], places))[before]
    found[-1:] = len(text)
    return found


def _structure(student: Vocabulary, teacher: Vocabulary) -> Mapping[int, int | None]:
    """The student's structural ids and the teacher's for them. A special one that the teacher lacks
    is None, and so is the half that it lacks of a pair; another one that is not special is text,
    and not here."""
    found: dict[int, int | None] = {}
    for text, token in student.structural.items():
        if token in student.special or teacher.marks(text):
            found[token] = teacher.structure(text)
    return found
