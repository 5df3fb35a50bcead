"""Cancelling: what was answered is kept, and a retry goes on from there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spider_sdk.errors import JobCancelled
from spider_worker.pipelines.offline_gen import run
from spider_worker.testing import FakeEngine, InMemorySource, LocalStore
from tests.unit.offline_gen.jobs import Setup, rows


async def cancelled_when(setup: Setup, condition: Callable[[], bool]) -> float:
    """Run the job and cancel it on a condition; returns the seconds it then took to end."""
    ctx = setup.context()
    job = asyncio.create_task(setup.run(ctx=ctx))
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - any condition
            await asyncio.sleep(0.002)
        ctx.cancel()
        started = time.monotonic()
        with pytest.raises(JobCancelled):
            await job
    return time.monotonic() - started


def test_what_is_in_flight_is_answered_and_nothing_more_is_asked(tmp_path: Path) -> None:
    engine = FakeEngine(capacity=4, latency=0.02)
    setup = Setup(tmp_path, engine=engine, source=InMemorySource(rows(40)), shard_size=40)
    asyncio.run(cancelled_when(setup, lambda: len(engine.asked) >= 8))
    asked = len(engine.asked)
    assert asked < 40
    (shard,) = LocalStore(tmp_path).shards()
    assert not shard.complete
    assert shard.counters["rows_ok"] == asked
    setup.engine = again = FakeEngine()
    done = setup.go(retry=True)
    assert len(again.asked) == 40 - asked
    assert [r["index"] for r in done.records()] == list(range(40))
    assert done.counters()["completion_tokens"] == 80


def test_a_request_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_LAST_ANSWERS", 0.05)
    engine = FakeEngine(latency=lambda m: 3600 if m[-1]["content"] == "q3" else 0)
    setup = Setup(tmp_path, engine=engine, shard_size=10)
    asyncio.run(cancelled_when(setup, lambda: len(engine.asked) == 10))
    (shard,) = LocalStore(tmp_path).shards()
    assert shard.counters["rows_done"] == 9
    assert engine.in_flight == 0


def test_dropped_rows_and_waiting_completions_survive_a_cancel(tmp_path: Path) -> None:
    from spider_worker.testing import FakeSandbox

    engine = FakeEngine()
    setup = Setup(tmp_path, engine=engine, shard_size=10)
    setup.pre = lambda row: None if row["number"] == 4 else row["question"]
    setup.post = lambda row: {"answer": row["completion"]}
    plain = FakeSandbox.call

    async def held(self: FakeSandbox, batch: list[dict[str, object]]) -> object:
        if self._stage == "post_processor":
            await asyncio.Event().wait()
        return await plain(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeSandbox, "call", held)
        asyncio.run(cancelled_when(setup, lambda: len(engine.asked) == 9))
    (shard,) = LocalStore(tmp_path).shards()
    assert shard.counters["rows_done"] == 1
    assert shard.counters["completion_tokens"] == 18
    setup.pre = lambda row: row["question"]
    done = setup.go(retry=True)
    assert len(engine.asked) == 9
    assert done.counters()["rows_ok"] == 9
    assert done.counters()["rows_dropped"] == 1
    assert done.counters()["completion_tokens"] == 18


def test_a_cancelled_unit_leaves_the_requests_of_another_alone(tmp_path: Path) -> None:
    from spider_worker.engines.base import Completion
    from spider_worker.pipelines.offline_gen.pool import Request, RequestPool
    from spider_worker.pipelines.rows.prompts import Prepared

    class Owner:
        def __init__(self) -> None:
            self.heard: list[str] = []

        def completed(self, request: Request, completion: Completion) -> None:
            self.heard.append("completed")

        def row_failed(self, request: Request, error: Exception) -> None:
            self.heard.append("failed")

        def broke(self, error: BaseException) -> None:
            self.heard.append(type(error).__name__)

    async def main() -> tuple[Owner, Owner]:
        one, two = Owner(), Owner()
        pool = RequestPool(FakeEngine(latency=0.02), 4)
        prepared = Prepared("p", [{"role": "user", "content": "p"}], {})
        pool.submit(Request(one, i, 0, prepared, {}) for i in range(6))
        pool.submit(Request(two, i, 0, prepared, {}) for i in range(3))
        await asyncio.sleep(0)
        assert pool.withdraw(one) == 2
        pool.abandon(one)
        async with asyncio.timeout(10):
            while len(one.heard) + len(two.heard) < 7:  # noqa: ASYNC110 - lists
                await asyncio.sleep(0.002)
        await pool.close()
        return one, two

    one, two = asyncio.run(main())
    assert one.heard == ["CancelledError"] * 4
    assert two.heard == ["completed"] * 3
