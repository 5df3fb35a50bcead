"""Spans: the finest pieces that two token sequences of the same bytes have in common.

Both sequences are cut wherever a token ends in both. Every piece between two such cuts holds one
or more whole tokens of either side, and exactly the same bytes.
"""

from __future__ import annotations

__all__ = ["Indices", "Spans", "align"]

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """C spans as half-open ranges of token indices, each array (C,) int64. Ordered and disjoint on
    both sides; tokens between two spans belong to none."""

    student_begin: Indices
    student_end: Indices
    teacher_begin: Indices
    teacher_end: Indices

    def __len__(self) -> int:
        return len(self.student_begin)

    @classmethod
    def joined(cls, parts: Sequence[Spans]) -> Spans:
        """The spans of consecutive stretches, in order."""
        arrays = zip(
            *(
                (part.student_begin, part.student_end, part.teacher_begin, part.teacher_end)
                for part in parts
            ),
            strict=True,
        )
        joined = [np.concatenate(array) for array in arrays]
        return cls(*joined) if joined else cls.single(0, 0, 0, 0).taken(slice(0))

    @classmethod
    def single(
        cls, student_begin: int, student_end: int, teacher_begin: int, teacher_end: int
    ) -> Spans:
        """One span."""
        values = (student_begin, student_end, teacher_begin, teacher_end)
        return cls(*(np.array([value], dtype=np.int64) for value in values))

    def taken(self, which: slice | NDArray[np.bool_]) -> Spans:
        """Some of them."""
        return Spans(
            self.student_begin[which],
            self.student_end[which],
            self.teacher_begin[which],
            self.teacher_end[which],
        )

    def moved(self, student: int, teacher: int) -> Spans:
        """The same spans, counted from elsewhere."""
        return Spans(
            self.student_begin + student,
            self.student_end + student,
            self.teacher_begin + teacher,
            self.teacher_end + teacher,
        )

    @property
    def covered(self) -> int:
        """The number of student tokens in spans."""
        return int((self.student_end - self.student_begin).sum())


def align(
    student_ends: Indices, teacher_ends: Indices, *, student_start: int = 0, teacher_start: int = 0
) -> Spans:
    """Spans between two sequences over the same bytes, in linear time.

    Entry ``i`` is the offset in bytes at which token ``i`` ends, so each is non-decreasing;
    ``*_start`` is where its first token begins. Where one sequence covers bytes that the other
    does not, its tokens there are in no span. A token without bytes joins the span before it,
    or the first one where it stands before all of them.
    """
    low = min(student_start, teacher_start)
    student_counts = _counts(student_start, student_ends, low)
    teacher_counts = _counts(teacher_start, teacher_ends, low)
    size = min(len(student_counts), len(teacher_counts))
    shared = _marks(student_start, student_ends, low, size)
    shared &= _marks(teacher_start, teacher_ends, low, size)
    cuts = np.flatnonzero(shared)
    # The last token that ends at a cut is the last before it, tokens without bytes included.
    student_cut, teacher_cut = student_counts[cuts], teacher_counts[cuts]
    # What has no bytes where the sequence itself begins has no span before it to join.
    student_cut[cuts == student_start - low] = 0
    teacher_cut[cuts == teacher_start - low] = 0
    return Spans(student_cut[:-1], student_cut[1:], teacher_cut[:-1], teacher_cut[1:])


def _counts(start: int, ends: Indices, low: int) -> Indices:
    """How many tokens have ended by each byte from ``low`` on, up to the last one's end."""
    return np.cumsum(np.bincount(ends - low, minlength=start - low + 1))


def _marks(start: int, ends: Indices, low: int, size: int) -> NDArray[np.bool_]:
    """At which of ``size`` bytes from ``low`` on a token ends, or the first one begins."""
    marks = np.zeros(size, dtype=bool)
    places = ends - low
    marks[places[places < size]] = True
    marks[start - low : start - low + 1] = True
    return marks
