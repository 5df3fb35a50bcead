"""From two models' log-probabilities, over spans, to an advantage for each student token.

δ of a span is Σ log p − Σ log q over its tokens, each model with its own tokenizer; the sum over
all spans is the sampled reverse KL of the completion. Every student token of a span gets −δ of the
whole span (*full credit*), which is the exact gradient: all of the span's tokens have a part in
all of its bytes. Sharing it out among them makes the gradient too small, or crooked.
"""

from __future__ import annotations

__all__ = ["FLOOR", "position_baseline", "span_advantages", "span_deltas"]

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from spider_worker.distill.alignment import Indices, Spans

Floats = NDArray[np.float64]

#: What a log-probability that is no finite number, or is below, counts as: e^−100 is as good as
#: never, and its difference to another is a number.
FLOOR: Final = -100.0


def span_deltas(
    spans: Spans, student_logprobs: NDArray[Any], teacher_logprobs: NDArray[Any]
) -> tuple[Floats, int]:
    """δ (C,) in nats, and how many of the teacher's entries had to be raised to ``FLOOR``.

    ``student_logprobs`` (N,) and ``teacher_logprobs`` (M,) are indexed as the spans are. Only
    entries in spans count.
    """
    student, _ = _finite(student_logprobs)
    teacher, raised = _finite(teacher_logprobs)
    inside = _sums(raised.astype(np.float64), spans.teacher_begin, spans.teacher_end)
    deltas = _sums(student, spans.student_begin, spans.student_end) - _sums(
        teacher, spans.teacher_begin, spans.teacher_end
    )
    return deltas, int(inside.sum())


def span_advantages(
    spans: Spans,
    deltas: Floats,
    count: int,
    *,
    coef: float,
    discount: float,
    clip: float,
    mask: NDArray[np.bool_],
) -> Floats:
    """Advantages (N,) of ``count`` = N student tokens.

    A_i = coef · clip(Σ_{k ≥ c} discount^(k−c) · (−δ_k)) for each token i of span c: the discount
    counts spans, since a span is what both models decide on at once. ``clip`` bounds the sum's
    size (0: no bound). Zero outside the spans, and wherever ``mask`` (N,) is False, for any
    discount.
    """
    rewards = (
        np.clip(_discounted(-deltas, discount), -clip, clip)
        if clip
        else _discounted(-deltas, discount)
    )
    advantages = np.zeros(count, dtype=np.float64)
    widths = spans.student_end - spans.student_begin
    advantages[_inside(spans.student_begin, widths)] = np.repeat(coef * rewards, widths)
    advantages[~mask] = 0.0
    return advantages


def position_baseline(advantages: Sequence[Floats]) -> list[Floats]:
    """Advantages less the batch's mean at each position, counted from the completion's start.

    A baseline that does not depend on the token keeps the gradient's expectation and takes
    variance away; a mean that includes the token itself shrinks it by 1/n at a position that n
    completions have. Where only one has it nothing is taken away; zeros (tokens that are not
    compared) stay zero and do not count.
    """
    longest = max((len(one) for one in advantages), default=0)
    sums, counts = np.zeros(longest), np.zeros(longest)
    for one in advantages:
        sums[: len(one)] += one
        counts[: len(one)] += one != 0
    means = np.divide(sums, counts, out=np.zeros(longest), where=counts > 1)
    return [np.where(one != 0, one - means[: len(one)], 0.0) for one in advantages]


def _discounted(rewards: Floats, discount: float) -> Floats:
    """Σ_{k ≥ c} discount^(k−c) · rewards_k for each c."""
    if discount == 0.0:
        return rewards.copy()
    if discount == 1.0:
        return np.cumsum(rewards[::-1])[::-1]
    sums = np.empty_like(rewards)
    running = 0.0
    for place in range(len(rewards) - 1, -1, -1):
        running = rewards[place] + discount * running
        sums[place] = running
    return sums


def _finite(logprobs: NDArray[Any]) -> tuple[Floats, NDArray[np.bool_]]:
    values = np.asarray(logprobs, dtype=np.float64)
    raised = ~((values >= FLOOR) & (values < np.inf))  # NaN compares with nothing
    return np.where(raised, FLOOR, values), raised


def _sums(values: Floats, begin: Indices, end: Indices) -> Floats:
    """The sum of each range: exact for ranges far along, where differences of running sums would
    have lost digits."""
    if not len(begin):
        return np.zeros(0)
    if not (end > begin).all():
        return np.array([values[b:e].sum() for b, e in zip(begin, end, strict=True)])
    edges = np.stack([begin, end], axis=1).ravel()
    padded = np.append(values, 0.0)
    return np.asarray(np.add.reduceat(padded, edges)[::2])


def _inside(begin: Indices, widths: Indices) -> Indices:
    """The indices in ranges of these widths, in order."""
    starts = np.repeat(begin - np.concatenate(([0], np.cumsum(widths)[:-1])), widths)
    return starts + np.arange(widths.sum())
