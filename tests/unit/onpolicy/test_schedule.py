"""The learning rate over a run, whichever of its ends comes first."""

from __future__ import annotations

from typing import Any

import pytest

from spider_sdk.config.model import OnPolicyOptions, TeacherConfig
from spider_sdk.errors import FatalJobError
from spider_worker.pipelines.onpolicy_train.prompts import Cursor
from spider_worker.pipelines.onpolicy_train.schedule import LearningRate


def linear(rows: int | None, **options: Any) -> LearningRate:
    given = {"learning_rate": 1.0, "lr_schedule": "linear", **options}
    return LearningRate.of(OnPolicyOptions(teacher=(TeacherConfig("t"),), **given), rows)


def test_a_constant_rate_needs_no_end() -> None:
    rate = linear(None, lr_schedule="constant")
    assert rate.of_batch(Cursor(), Cursor(3, 7), 10**9, 10, 2) == [1.0, 1.0]


def test_rows_of_all_epochs_count() -> None:
    rate = linear(10, epochs=2)
    assert rate.of_batch(Cursor(), Cursor(0, 10), 0, 99, 2) == pytest.approx([1, 0.75])
    assert rate.of_batch(Cursor(1, 5), Cursor(1, 10), 0, 99, 1) == pytest.approx([0.25])


def test_what_comes_first_is_the_end() -> None:
    rate = linear(10, token_budget=100)
    # The data is nearer to its end, then the budget.
    assert rate.of_batch(Cursor(0, 5), Cursor(0, 6), 20, 1, 1) == pytest.approx([0.5])
    assert rate.of_batch(Cursor(0, 5), Cursor(0, 6), 80, 1, 1) == pytest.approx([0.2])


def test_no_part_of_a_batch_that_passes_the_budget_is_trained_on_for_nothing() -> None:
    rate = linear(None, token_budget=100)
    made = rate.of_batch(Cursor(), Cursor(0, 4), 0, 1000, 4)
    assert made == pytest.approx([1, 0.75, 0.5, 0.25])


def test_an_end_that_nobody_knows_is_refused() -> None:
    with pytest.raises(FatalJobError, match=r"set token_budget or source\.max_examples"):
        linear(None)
