"""Spans from two lists of ends, against the definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spider_worker.distill.alignment import Spans, align

Ranges = list[tuple[int, int, int, int]]


def ranges(spans: Spans) -> Ranges:
    arrays = (spans.student_begin, spans.student_end, spans.teacher_begin, spans.teacher_end)
    return list(zip(*(array.tolist() for array in arrays), strict=True))


def aligned(student: list[int], teacher: list[int], **starts: int) -> Ranges:
    return ranges(align(np.array(student, np.int64), np.array(teacher, np.int64), **starts))


def by_definition(
    student: list[int], teacher: list[int], student_start: int, teacher_start: int
) -> Ranges:
    """Token by token: a place counts as passed once every token that ends there has."""
    cuts = sorted({student_start, *student} & {teacher_start, *teacher})

    def passed(ends: list[int], start: int, cut: int) -> int:
        return 0 if cut == start else sum(end <= cut for end in ends)

    found = []
    for low, high in itertools.pairwise(cuts):
        begins = passed(student, student_start, low), passed(teacher, teacher_start, low)
        ends = passed(student, student_start, high), passed(teacher, teacher_start, high)
        found.append((begins[0], ends[0], begins[1], ends[1]))
    return found


def test_cuts_are_where_both_have_an_end() -> None:
    # ab|cd|e and a|bc|d|e: "abcd" has no cut of both inside.
    assert aligned([2, 4, 5], [1, 3, 4, 5]) == [(0, 2, 0, 3), (2, 3, 3, 4)]


def test_equal_sequences_have_a_span_a_token() -> None:
    assert aligned([1, 3, 6], [1, 3, 6]) == [(n, n + 1, n, n + 1) for n in range(3)]


@pytest.mark.parametrize(
    ("student", "teacher"), [([], []), ([3], []), ([], [3]), ([2, 5], [1, 3]), ([0, 0], [0])]
)
def test_without_two_cuts_there_is_no_span(student: list[int], teacher: list[int]) -> None:
    assert aligned(student, teacher) == []


def test_a_token_without_bytes_joins_the_span_before_it() -> None:
    assert aligned([1, 1, 2], [1, 2, 2]) == [(0, 2, 0, 1), (2, 3, 1, 3)]


def test_tokens_without_bytes_before_everything_join_the_first_span() -> None:
    assert aligned([0, 0, 1], [0, 1]) == [(0, 3, 0, 2)]


def test_tokens_that_end_where_the_first_cut_is_stand_before_it() -> None:
    # The student begins later; three of the teacher's tokens are parts of one character there.
    assert aligned([3, 5], [3, 3, 3, 5], student_start=1) == [(1, 2, 3, 4)]


def test_what_one_side_alone_covers_is_in_no_span() -> None:
    assert aligned([2, 4, 6], [4, 5], teacher_start=2) == [(1, 2, 0, 1)]


ENDS = st.lists(st.integers(0, 3), max_size=12)


@given(ENDS, ENDS, st.integers(0, 4), st.integers(0, 4))
def test_spans_are_those_of_the_definition(
    student: list[int], teacher: list[int], student_start: int, teacher_start: int
) -> None:
    ends = (np.cumsum(student, dtype=np.int64) + student_start).tolist()
    theirs = (np.cumsum(teacher, dtype=np.int64) + teacher_start).tolist()
    assert aligned(
        ends, theirs, student_start=student_start, teacher_start=teacher_start
    ) == by_definition(ends, theirs, student_start, teacher_start)


def test_spans_can_be_moved_joined_and_chosen() -> None:
    first, second = Spans.single(0, 2, 0, 1), Spans.single(0, 1, 0, 3).moved(2, 1)
    both = Spans.joined([first, second])
    assert ranges(both) == [(0, 2, 0, 1), (2, 3, 1, 4)]
    assert both.covered == 3
    assert ranges(both.taken(np.array([False, True]))) == [(2, 3, 1, 4)]
    assert len(Spans.joined([])) == 0
    assert Spans.joined([]).student_begin.dtype == np.int64
