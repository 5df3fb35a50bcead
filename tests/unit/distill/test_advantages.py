"""Advantages against their formula, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spider_worker.distill.advantages import (
    FLOOR,
    position_baseline,
    span_advantages,
    span_deltas,
)
from spider_worker.distill.alignment import Spans

#: Two spans with a gap on both sides: tokens 1 and 2 against 0, token 4 against 2 and 3.
SPANS = Spans.joined([Spans.single(1, 3, 0, 1), Spans.single(4, 5, 2, 4)])
STUDENT = np.array([-9.0, -1.0, -2.0, -9.0, -0.5, -9.0])
TEACHER = np.array([-1.5, -9.0, -0.25, -0.25, -9.0])


def advantages(deltas: list[float], **changes: object) -> list[float]:
    options = {"coef": 1.0, "discount": 0.0, "clip": 0.0, "mask": np.ones(6, bool), **changes}
    return span_advantages(SPANS, np.array(deltas), 6, **options).tolist()  # type: ignore[arg-type]


def test_delta_is_student_less_teacher_over_the_span() -> None:
    deltas, clipped = span_deltas(SPANS, STUDENT, TEACHER)
    assert deltas.tolist() == [-1.5, 0.0]
    assert clipped == 0


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf, -1e9])
def test_what_is_no_log_probability_counts_as_the_floor_and_is_counted(bad: float) -> None:
    teacher = TEACHER.copy()
    teacher[0] = teacher[1] = bad  # the second is in no span
    deltas, clipped = span_deltas(SPANS, STUDENT, teacher)
    assert deltas[0] == -3.0 - FLOOR
    assert clipped == 1


def test_no_spans_no_deltas() -> None:
    deltas, clipped = span_deltas(Spans.joined([]), STUDENT, TEACHER)
    assert deltas.shape == (0,)
    assert clipped == 0
    none = span_advantages(
        Spans.joined([]), deltas, 3, coef=1.0, discount=0.5, clip=1.0, mask=np.ones(3, bool)
    )
    assert none.tolist() == [0.0] * 3


def test_a_sum_far_along_loses_no_digits() -> None:
    big = np.full(100_001, -1e9)
    big[-1] = -1e-6
    spans = Spans.single(100_000, 100_001, 0, 1)
    deltas, _ = span_deltas(spans, np.where(big < -100, -99.0, big), np.array([-2e-6]))
    assert deltas[0] == pytest.approx(1e-6, rel=1e-9)


def test_each_token_of_a_span_has_the_whole_of_it() -> None:
    assert advantages([2.0, -3.0]) == [0.0, -2.0, -2.0, 0.0, 3.0, 0.0]


def test_the_discount_counts_spans_and_not_tokens() -> None:
    assert advantages([2.0, -3.0], discount=0.5) == [0.0, -0.5, -0.5, 0.0, 3.0, 0.0]


def test_the_sum_is_clipped_and_not_its_terms() -> None:
    assert advantages([8.0, -6.0], discount=1.0, clip=5.0) == [0.0, -2.0, -2.0, 0.0, 5.0, 0.0]


def test_the_coefficient_comes_after_the_clip() -> None:
    assert advantages([8.0, 0.0], clip=5.0, coef=0.1)[1] == pytest.approx(-0.5)


def test_the_mask_comes_after_the_discount() -> None:
    mask = np.array([True, False, True, True, True, True])
    assert advantages([0.0, -4.0], discount=1.0, mask=mask) == [0.0, 0.0, 4.0, 0.0, 4.0, 0.0]


@given(
    widths=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), max_size=8),
    deltas=st.lists(st.floats(-20, 20), min_size=8, max_size=8),
    discount=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    clip=st.sampled_from([0.0, 5.0]),
    coef=st.sampled_from([0.5, 1.0]),
)
def test_against_the_double_sum(
    widths: list[tuple[int, int]],
    deltas: list[float],
    discount: float,
    clip: float,
    coef: float,
) -> None:
    spans, at = [], 0
    for gap, width in widths:
        spans.append(Spans.single(at + gap, at + gap + width, 0, 1))
        at += gap + width
    used = np.array(deltas[: len(spans)])
    want = np.zeros(at + 1)
    for c, span in enumerate(spans):
        total = sum(discount ** (k - c) * -used[k] for k in range(c, len(spans)))
        total = max(-clip, min(clip, total)) if clip else total
        want[span.student_begin[0] : span.student_end[0]] = coef * total
    found = span_advantages(
        Spans.joined(spans),
        used,
        at + 1,
        coef=coef,
        discount=discount,
        clip=clip,
        mask=np.ones(at + 1, bool),
    )
    np.testing.assert_allclose(found, want, atol=1e-9)


def test_a_baseline_is_the_mean_of_those_that_are_compared_at_the_position() -> None:
    found = position_baseline([np.array([1.0, 2.0, 5.0]), np.array([3.0, 0.0]), np.array([])])
    assert [one.tolist() for one in found] == [[-1.0, 2.0, 5.0], [1.0, 0.0], []]


def test_no_completions_no_baseline() -> None:
    assert position_baseline([]) == []
