"""Whole distributions against the sums of ``PrefixMap``, entry by entry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spider_worker.distill.alignment import Spans
from spider_worker.distill.marginal import PrefixMap
from spider_worker.distill.whole import WholeMap


def prefix_map(image: list[int], size: int) -> Any:
    """A PrefixMap with that image, whatever vocabularies would have it."""
    made = PrefixMap.__new__(PrefixMap)
    made.__dict__.update(image=np.array(image), _size=size)
    return made


def spans_of(count: int) -> Spans:
    every = np.arange(count)
    return Spans(every, every + 1, every, every + 1)


def dense(ids: np.ndarray, probs: np.ndarray, size: int) -> np.ndarray:
    table = np.zeros((len(ids), size))
    for row in range(len(ids)):
        for token, prob in zip(ids[row], probs[row], strict=True):
            if token >= 0:
                table[row, token] += prob
    return table


@pytest.mark.parametrize(
    "image",
    [[0, 1, 2, 3, 4], [3, 3, -1, 0, 3], [2, 2, 2, 2, 2], [-1, 4, -1, 4, 0], [-1, -1, -1, -1, -1]],
)
@pytest.mark.parametrize("told", [None, [True, False, True, True, False]])
def test_a_whole_distribution_is_summed_as_its_entries_are(
    image: list[int], told: list[bool] | None
) -> None:
    rng = np.random.default_rng(0)
    logprobs = np.log(rng.dirichlet(np.ones(5), size=6)).astype(np.float32)
    sampled = np.array([0, 1, 2, 3, 4, 7])  # the last: no token of the vocabulary
    prefixes = prefix_map(image, 5)
    usable = prefixes.told if told is None else np.array(told) & prefixes.told
    ids = np.broadcast_to(np.arange(5), (6, 5))
    at, its_ids, its_probs = prefixes.targets(spans_of(6), sampled, ids, logprobs, told=usable)
    whole = WholeMap(prefixes.image, usable, 5)
    positions, all_ids, probs = whole.targets(spans_of(6), sampled, logprobs)
    np.testing.assert_array_equal(positions, at)
    assert all_ids.shape == probs.shape
    assert probs.dtype == np.float32
    np.testing.assert_allclose(dense(all_ids, probs, 5), dense(its_ids, its_probs, 5), rtol=1e-6)


def test_a_teacher_with_fewer_logits_than_tokens_has_their_columns_alone() -> None:
    whole = WholeMap(np.array([2, 1, 0, 1]), np.ones(3, dtype=bool), 2)
    assert whole.ids.tolist() == [1, 2]
    logprobs = np.log(np.array([[0.25, 0.75]], dtype=np.float32))
    _, _, probs = whole.targets(spans_of(1), np.array([2]), logprobs)
    np.testing.assert_allclose(probs, [[0.75, 0.25]])


def test_spans_say_which_rows_belong_together() -> None:
    spans = Spans(*(np.array(part) for part in ([0, 2], [2, 3], [1, 2], [2, 4])))
    logprobs = np.log(np.array([[0.5, 0.5], [0.1, 0.9], [0.7, 0.3]], dtype=np.float32))
    whole = WholeMap(np.array([0, 1]), np.ones(2, dtype=bool), 2)
    positions, _, probs = whole.targets(spans, np.array([1, 0, 1]), logprobs)
    assert positions.tolist() == [0, 2]
    np.testing.assert_allclose(probs, [[0.1, 0.9], [0.7, 0.3]], rtol=1e-6)
