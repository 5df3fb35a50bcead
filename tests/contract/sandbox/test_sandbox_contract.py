"""What every sandbox must do, on the shipped fake and on the real one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from spider_sdk.errors import SpiderError
from spider_worker.sandbox.base import Outcome, Sandbox
from spider_worker.sandbox.process import ProcessSandbox
from spider_worker.testing import FakeSandbox

SOURCE = """
def f(row, times=1):
    what = row["what"]
    if what == "raise":
        raise ValueError(f"no {row['n']}")
    if what == "drop":
        return None
    if what == "odd":
        return {1, 2}
    row["n"] = row["n"] * times
    return row
"""

Make = Callable[..., Sandbox]


def fake(**kwargs: Any) -> Sandbox:
    names: dict[str, Any] = {}
    exec(SOURCE, names)
    return FakeSandbox(names["f"], "pre_processor", kwargs=kwargs)


def real(**kwargs: Any) -> Sandbox:
    return ProcessSandbox(
        name="f", source=SOURCE, kwargs=kwargs, stage="pre_processor", mode="process"
    )


@pytest.fixture(params=[fake, real], ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Make:
    chosen: Make = request.param
    return chosen


def outcomes(box: Sandbox, *batches: list[dict[str, Any]]) -> list[list[Outcome]]:
    async def body() -> list[list[Outcome]]:
        await box.start()
        try:
            return list(await asyncio.gather(*map(box.call, batches)))
        finally:
            await box.stop()
            await box.stop()

    return asyncio.run(body())


def row(n: int, what: str = "keep") -> dict[str, Any]:
    return {"n": n, "what": what}


def test_one_outcome_a_row_in_order(make: Make) -> None:
    whats = ["keep", "drop", "raise", "odd", "keep"]
    (made,) = outcomes(make(), [row(n, what) for n, what in enumerate(whats)])
    assert [outcome.value for outcome in made] == [row(0), None, None, None, row(4)]
    assert [outcome.error is not None for outcome in made] == [False, False, True, True, False]


def test_what_a_function_raises_is_told_with_its_line(make: Make) -> None:
    ((outcome,),) = outcomes(make(), [row(7, "raise")])
    error = outcome.error
    assert error is not None
    assert (error.stage, error.kind) == ("pre_processor", "ValueError")
    assert error.message == "no 7"
    assert error.trace is not None
    assert error.trace.rstrip().endswith("ValueError: no 7")


def test_kwargs_go_with_every_call(make: Make) -> None:
    (made,) = outcomes(make(times=3), [row(1), row(2)])
    assert [outcome.value["n"] for outcome in made] == [3, 6]


def test_the_callers_rows_stay_as_they_are(make: Make) -> None:
    rows = [row(1)]
    outcomes(make(times=9), rows)
    assert rows == [row(1)]


def test_calls_may_overlap(make: Make) -> None:
    batches = [[row(10 * batch + n) for n in range(5)] for batch in range(4)]
    made = outcomes(make(), *batches)
    assert [[outcome.value for outcome in part] for part in made] == batches


def test_no_rows_are_no_outcomes(make: Make) -> None:
    assert outcomes(make(), []) == [[]]


def test_it_must_be_started_and_may_be_stopped_before_that(make: Make) -> None:
    async def body() -> None:
        box = make()
        await box.stop()
        with pytest.raises(SpiderError):
            await box.call([row(1)])

    asyncio.run(body())
