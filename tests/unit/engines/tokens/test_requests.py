"""What is asked of a request before it goes anywhere."""

from __future__ import annotations

import numpy as np
import pytest

from spider_sdk.errors import RowError
from spider_worker.engines.tokens.requests import checked, limit, sample_seeds
from spider_worker.tokens import SampleParams


def test_ids_come_back_as_plain_numbers() -> None:
    found = checked(np.array([5, 9]), vocabulary=10, context=2)
    assert found == (5, 9)
    assert all(type(token) is int for token in found)


@pytest.mark.parametrize(
    ("tokens", "kind", "said"),
    [
        ((), "empty", "no tokens"),
        ((5, 10), "vocabulary", "token 10 is none of the model's 10"),
        ((-1, 5), "vocabulary", "token -1"),
        ((1, 2, 3), "context", "3 tokens does not fit the context of 2"),
    ],
)
def test_what_no_model_takes_is_a_rows_error(tokens: tuple[int, ...], kind: str, said: str) -> None:
    with pytest.raises(RowError, match=said) as caught:
        checked(tokens, vocabulary=10, context=2)
    assert caught.value.kind == kind


def test_what_is_not_known_is_left_to_the_model() -> None:
    assert checked((5, 10**6), vocabulary=None, context=None) == (5, 10**6)


def test_a_sample_has_the_room_that_its_prompt_leaves() -> None:
    params = SampleParams(10)
    assert limit((1,) * 5, 1, params, context=100) == 10
    assert limit((1,) * 95, 1, params, context=100) == 5
    assert limit((1,) * 95, 1, params, context=None) == 10
    with pytest.raises(RowError, match="leaves no room") as caught:
        limit((1,) * 100, 1, params, context=100)
    assert caught.value.kind == "context"


@pytest.mark.parametrize(("n", "most"), [(0, 1), (1, 0)])
def test_counts_begin_at_one(n: int, most: int) -> None:
    with pytest.raises(ValueError, match="count from 1"):
        limit((1,), n, SampleParams(most), context=None)


def test_a_seed_is_of_the_prompt_the_number_and_the_runs_own() -> None:
    seeds = sample_seeds((1, 2), 7, 4, bits=31)
    assert seeds == sample_seeds((1, 2), 7, 4, bits=31)
    assert seeds[:2] == sample_seeds((1, 2), 7, 2, bits=31)
    others = (*sample_seeds((1, 3), 7, 4, bits=31), *sample_seeds((1, 2), 8, 4, bits=31))
    assert len({*seeds, *others}) == 12
    assert all(seed is not None and 0 <= seed < 2**31 for seed in (*seeds, *others))
    assert sample_seeds((1, 2), None, 3, bits=63) == (None, None, None)
    assert max(seed or 0 for seed in sample_seeds((1, 2), 7, 64, bits=63)) > 2**60
