"""A student's completion as the teacher's token ids, and the spans between the two.

The completion is cut into segments: text, structure (thinking and tool delimiters), the stop. Text
goes over byte by byte; structure and the stop go over as what they mean, and are never spelt
out: a student whose ``<|im_end|>`` is scored as eleven letters is punished for stopping. A segment
that cannot be mapped is left out alone, with a reason, and moves nothing that comes after it.
"""

from __future__ import annotations

__all__ = ["Kind", "Translation", "Translator"]

import collections
import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from spider_worker.distill.alignment import Indices, Spans, align
from spider_worker.distill.vocabulary import Vocabulary


class Kind(enum.IntEnum):
    """What a span is made of."""

    TEXT = 0
    STRUCTURE = 1
    STOP = 2


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Translation:
    """``teacher_tokens`` (M,) continue the teacher's prompt. ``spans`` index the completion's
    tokens (N,) and these; ``kinds`` (C,) says what each is. ``dropped`` counts student tokens in
    no span, by reason; ``coverage`` is the share of the others (1 of an empty completion)."""

    teacher_tokens: Indices
    spans: Spans
    kinds: NDArray[np.int64]
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
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, tokens: Indices, spans: Spans | None, kind: Kind) -> None:
        """``spans`` count teacher tokens from the first of ``tokens``; None: in no span."""
        if spans is not None and len(spans):
            self.spans.append(spans.moved(0, self.count))
            self.kinds.append(np.full(len(spans), int(kind)))
        self.tokens.append(tokens)
        self.count += len(tokens)


class Translator:
    """From one vocabulary to another. ``structural`` maps the student's names of delimiters to the
    teacher's where they differ."""

    def __init__(
        self,
        student: Vocabulary,
        teacher: Vocabulary,
        *,
        structural: Mapping[str, str] | None = None,
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._same = student.same_ids(teacher)
        self._structure = _structure(student, teacher, structural or {})

    def translate(self, ids: Sequence[int], *, stopped: bool) -> Translation:
        """``ids`` (N,) as sampled. ``stopped``: the last is a stop token, which becomes the
        teacher's end of turn; else the completion was cut and has no stop to compare."""
        tokens = np.asarray(ids, dtype=np.int64)
        work = _Work()
        body = len(tokens) - 1 if stopped and len(tokens) else len(tokens)
        if self._same:
            whole = np.arange(body, dtype=np.int64)
            work.add(tokens[:body], Spans(whole, whole + 1, whole, whole + 1), Kind.TEXT)
        else:
            for begin, end, structural in self._segments(tokens[:body]):
                if structural:
                    self._structural(work, begin, int(tokens[begin]))
                else:
                    self._text(work, tokens, begin, end)
        if body < len(tokens):
            self._stop(work, body, int(tokens[body]))
        spans = Spans.joined(work.spans)
        return Translation(
            teacher_tokens=np.concatenate([*work.tokens, np.zeros(0, dtype=np.int64)]),
            spans=spans,
            kinds=np.concatenate([*work.kinds, np.zeros(0, dtype=np.int64)]),
            dropped=dict(work.dropped),
            coverage=spans.covered / len(tokens) if len(tokens) else 1.0,
        )

    def _segments(self, tokens: Indices) -> Iterator[tuple[int, int, bool]]:
        """Ranges of text between single tokens of structure."""
        begin = 0
        for place, token in enumerate(tokens.tolist()):
            if token in self._structure or not self._has_bytes(token):
                if place > begin:
                    yield begin, place, False
                yield place, place + 1, True
                begin = place + 1
        if begin < len(tokens):
            yield begin, len(tokens), False

    def _has_bytes(self, token: int) -> bool:
        pieces = self._student.pieces
        return token < len(pieces) and pieces[token] is not None

    def _structural(self, work: _Work, place: int, token: int) -> None:
        mapped = self._structure.get(token)
        if mapped is None:
            name = self._student.texts.get(token)
            work.dropped["unknown token" if name is None else f"no {name} in the teacher"] += 1
            return
        work.add(np.array([mapped]), Spans.single(place, place + 1, 0, 1), Kind.STRUCTURE)

    def _stop(self, work: _Work, place: int, token: int) -> None:
        teacher = self._teacher
        mapped = token if self._same and token in teacher.stops else teacher.end_of_turn
        if mapped is None:
            work.dropped["the teacher has no end of turn"] += 1
            return
        work.add(np.array([mapped]), Spans.single(place, place + 1, 0, 1), Kind.STOP)

    def _text(self, work: _Work, tokens: Indices, begin: int, end: int) -> None:
        """A stretch of text, by its bytes. Bytes that are no UTF-8 (a character that was cut, or
        noise) are left out with the tokens that touch them."""
        part = tokens[begin:end]
        if self._student.exact:
            data = self._student.bytes_of(part.tolist())
            ends = np.cumsum(self._student.lengths[part])
        else:
            text = self._student.tokenizer.decode(part.tolist(), skip_special_tokens=False)
            found = self._student.encode_ends(text)
            if found is None or not np.array_equal(found.ids, part):
                work.dropped["text that the student's tokenizer does not give back"] += len(part)
                return
            data, ends = text.encode(), found.ends
        covered = 0
        for start, stop in _valid_runs(data):
            covered += self._run(work, data[start:stop].decode(), start, begin, ends)
            if stop < len(data):
                # So that the teacher sees that something stood here.
                work.add(np.array(self._teacher.encode("\ufffd"), dtype=np.int64), None, Kind.TEXT)
        if covered < len(part):
            valid = sum(stop - start for start, stop in _valid_runs(data)) == len(data)
            reason = "text that the teacher's tokenizer changes" if valid else "no valid UTF-8"
            work.dropped[reason] += len(part) - covered

    def _run(self, work: _Work, text: str, start: int, begin: int, ends: Indices) -> int:
        """Valid text that begins at byte ``start`` of its segment; the number of student tokens
        that it covers."""
        if not text:
            return 0
        found = self._teacher.encode_ends(text)
        if found is None:
            work.add(np.array(self._teacher.encode(text), dtype=np.int64), None, Kind.TEXT)
            return 0
        spans = align(ends, found.ends + start, teacher_start=start)
        work.add(found.ids, spans.moved(begin, 0), Kind.TEXT)
        return spans.covered


def _valid_runs(data: bytes) -> list[tuple[int, int]]:
    """The stretches of valid UTF-8, at most one after each stretch of bad bytes; possibly empty."""
    runs: list[tuple[int, int]] = []
    start = 0
    while True:
        try:
            data[start:].decode()
        except UnicodeDecodeError as error:
            runs.append((start, start + error.start))
            start += error.end
            if start >= len(data):
                return [run for run in runs if run[0] < run[1]] if len(data) else runs
        else:
            runs.append((start, len(data)))
            return runs


def _structure(
    student: Vocabulary, teacher: Vocabulary, names: Mapping[str, str]
) -> Mapping[int, int | None]:
    """The student's structural ids and the teacher's for them. A special one that the teacher lacks
    is None; one that is not special and that the teacher lacks is text, and not here."""
    found: dict[int, int | None] = {}
    for text, token in student.structural.items():
        mapped = teacher.structural.get(names.get(text, text))
        if mapped is not None or token in student.special:
            found[token] = mapped
    return found
