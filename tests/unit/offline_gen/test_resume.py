"""What a new attempt takes over, and what a retry runs again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest

from spider_sdk.config.model import Pricing
from spider_sdk.errors import AuthError, PipelineError, RowError
from spider_worker.testing import FakeEngine, InMemorySource, LocalStore
from tests.unit.offline_gen.jobs import Setup, rows


class Flaky:
    """Fails rows, or the whole engine, as long as it is told to."""

    def __init__(self, *, bad: set[str] = frozenset(), dies_at: str | None = None) -> None:  # type: ignore[assignment]
        self.bad = bad
        self.dies_at = dies_at

    def __call__(self, messages: Any, params: Any) -> str:
        text = messages[-1]["content"]
        if text == self.dies_at:
            raise PipelineError("engine died")
        if text in self.bad:
            raise RowError("bad", stage="generation", kind="bad")
        return f"answer to {text}"


def test_a_new_attempt_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    flaky = Flaky(bad={"q2"}, dies_at="q7")
    first = FakeEngine(flaky, capacity=1)
    setup = Setup(tmp_path, engine=first, shard_size=10, pricing=Pricing(1.0, 1.0))
    with pytest.raises(PipelineError, match="engine died"):
        setup.go()
    flaky.dies_at, flaky.bad = None, set()
    setup.engine = second = FakeEngine(flaky, capacity=1)
    done = setup.go()
    assert first.asked == [f"q{i}" for i in range(8)]
    # q2 is an error row that nobody asked for again.
    assert second.asked == ["q7", "q8", "q9"]
    assert [r["index"] for r in done.records()] == list(range(10))
    counters = done.counters()
    assert (counters["rows_cached"], counters["rows_error"], counters["rows_done"]) == (7, 1, 10)
    # Nine good rows: one word asked, three answered; what the first attempt spent included.
    assert (counters["prompt_tokens"], counters["completion_tokens"]) == (9, 27)
    assert counters["cost_usd"] == pytest.approx(36 / 1e6)


def test_tokens_of_earlier_attempts_are_counted_once_however_many_there_were(
    tmp_path: Path,
) -> None:
    flaky = Flaky()
    setup = Setup(tmp_path, engine=FakeEngine(flaky, capacity=1), shard_size=10)
    setup.post = lambda row: {"only": row["completion"]}
    for text in ("q3", "q5", "q8"):
        flaky.dies_at = text
        with pytest.raises(PipelineError):
            setup.go()
    flaky.dies_at = None
    done = setup.go()
    assert done.counters()["completion_tokens"] == 30
    assert len(setup.engine.asked) == 10 + 3


def test_retry_runs_errored_rows_and_leaves_good_and_dropped_ones(tmp_path: Path) -> None:
    flaky = Flaky(bad={"q1", "q6"})
    setup = Setup(tmp_path, engine=FakeEngine(flaky))
    setup.pre = lambda row: None if row["number"] == 5 else row["question"]
    first = setup.go()
    assert first.counters()["rows_error"] == 2
    before = {s.unit: s.version for s in first.store.shards()}
    flaky.bad = set()
    setup.engine = engine = FakeEngine(flaky)
    done = setup.go(retry=True)
    assert sorted(engine.asked) == ["q1", "q6"]
    counters = done.counters()
    assert (counters["rows_ok"], counters["rows_error"], counters["rows_dropped"]) == (9, 0, 1)
    assert counters["completion_tokens"] == 27
    after = {s.unit: s.version for s in done.store.shards()}
    assert [unit for unit in after if after[unit] != before[unit]] == ["rows-00000", "rows-00001"]


def test_retry_that_breaks_goes_on_as_a_retry_does(tmp_path: Path) -> None:
    flaky = Flaky(bad={"q1", "q3", "q6"})
    setup = Setup(tmp_path, engine=FakeEngine(flaky, capacity=1), shard_size=10)
    setup.go()
    flaky.bad, flaky.dies_at = {"q1"}, "q6"
    with pytest.raises(PipelineError):
        setup.go(retry=True)
    flaky.dies_at = None
    setup.engine = engine = FakeEngine(flaky)
    done = setup.go()
    # q1 failed again in the retry itself, q3 is done: only what was left is asked for.
    assert engine.asked == ["q6"]
    assert done.counters()["rows_error"] == 1


def test_a_failed_post_processing_is_retried_without_a_second_request(tmp_path: Path) -> None:
    def bad(row: dict[str, Any]) -> Any:
        if row["index"] == 3:
            raise ValueError("not yet")
        return {"answer": row["completion"]}

    setup = Setup(tmp_path, post=bad)
    assert setup.go().counters()["rows_error"] == 1
    setup.post = lambda row: {"answer": row["completion"]}
    setup.engine = engine = FakeEngine()
    done = setup.go(retry=True)
    assert engine.asked == []
    assert done.records()[3] == {"id": "3-0", "index": 3, "sample": 0, "answer": "echo: q3"}
    assert done.counters()["completion_tokens"] == 20


def test_completions_that_wait_for_post_processing_survive_the_attempt(tmp_path: Path) -> None:
    def dies(row: dict[str, Any]) -> Any:
        raise AssertionError

    engine = FakeEngine()
    setup = Setup(tmp_path, engine=engine, post=dies, shard_size=10)

    async def broken(self: Any, batch: Any) -> Any:
        while len(engine.asked) < 10:  # noqa: ASYNC110 - asked is a list
            await asyncio.sleep(0)
        raise PipelineError("the sandbox's host is gone")

    from spider_worker.testing import FakeSandbox

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeSandbox, "call", broken)
        with pytest.raises(PipelineError, match="host is gone"):
            setup.go()
    setup.post = lambda row: row
    done = setup.go()
    assert len(engine.asked) == 10
    assert done.counters()["rows_ok"] == 10


def test_a_torn_last_line_and_an_unreadable_one_cost_their_rows_alone(tmp_path: Path) -> None:
    flaky = Flaky(dies_at="q6")
    setup = Setup(tmp_path, engine=FakeEngine(flaky, capacity=1), shard_size=10)
    with pytest.raises(PipelineError):
        setup.go()
    store = LocalStore(tmp_path)
    journal = tmp_path / "units" / store.units["rows-00000"]["journal"]
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[4] = b'{"id":"2-0","ind\x00\x00\x00\n'
    journal.write_bytes(b"".join(lines)[:-5])
    flaky.dies_at = None
    setup.engine = engine = FakeEngine(flaky)
    ctx_events: list[str] = []

    async def main() -> Any:
        ctx = setup.context()
        ctx.on_event = lambda level, code, message, data: ctx_events.append(code)
        return await setup.run(ctx=ctx)

    done = asyncio.run(main())
    assert sorted(engine.asked) == ["q2", "q5", "q6", "q7", "q8", "q9"]
    assert [r["index"] for r in done.records()] == list(range(10))
    assert ctx_events == ["engine.starting", "engine.ready", "rows.unreadable"]


def test_a_copy_that_was_cut_off_replaces_nothing(tmp_path: Path) -> None:
    from spider_worker.pipelines.offline_gen.journal import Journal, Spent
    from spider_worker.pipelines.offline_gen.ledger import Ledger, State
    from spider_worker.pipelines.offline_gen.resume import take_over

    def line(index: int, text: str) -> bytes:
        record = {"id": f"{index}-0", "index": index, "sample": 0, "completion": text}
        return orjson.dumps(record) + b"\n"

    whole = Journal(tmp_path / "whole")
    whole.ready(Spent(5, 6))
    whole.append(line(0, "kept"))
    whole.close()
    cut = Journal(tmp_path / "cut")
    cut.append(line(1, "not ready"))
    cut.close()
    ledger, journal = Ledger(0, 3, 1), Journal(tmp_path / "new")
    taken = take_over([tmp_path / "whole", tmp_path / "cut"], None, ledger, journal, priced=False)
    assert [ledger.state(slot) for slot in range(3)] == [State.OK, State.MISSING, State.MISSING]
    assert journal.read(*ledger.place(0)) == line(0, "kept")
    assert (taken.spent.prompt_tokens, taken.spent.completion_tokens) == (5, 6)
    journal.close()


def test_fatal_errors_leave_the_rows_so_far(tmp_path: Path) -> None:
    flaky = Flaky()

    def script(messages: Any, params: Any) -> str:
        if messages[-1]["content"] == "q9":
            raise AuthError("revoked")
        return flaky(messages, params)

    setup = Setup(tmp_path, engine=FakeEngine(script, capacity=1), shard_size=10)
    with pytest.raises(AuthError):
        setup.go()
    setup.engine = engine = FakeEngine(flaky)
    setup.go()
    assert engine.asked == ["q9"]


# Streams: sources that cannot count.


def test_a_stream_is_cut_as_it_is_read_without_reading_anything_twice(tmp_path: Path) -> None:
    source = InMemorySource(rows(10), stream=True)
    done = Setup(tmp_path, source=source, shard_size=3).go()
    assert [r["index"] for r in done.records()] == list(range(10))
    assert len(done.store.units) == 4
    assert source.opened == [(0, None)]
    assert done.store["rows_total"] is None


def test_a_stream_that_ends_with_a_unit_adds_no_empty_one(tmp_path: Path) -> None:
    done = Setup(tmp_path, source=InMemorySource(rows(9), stream=True), shard_size=3).go()
    assert len(done.store.units) == 3


def test_a_stream_resumes_and_retries(tmp_path: Path) -> None:
    flaky = Flaky(bad={"q9"}, dies_at="q4")
    setup = Setup(tmp_path, engine=FakeEngine(flaky, capacity=1), shard_size=3)
    setup.source = InMemorySource(rows(10), stream=True)
    with pytest.raises(PipelineError):
        setup.go()
    flaky.dies_at = None
    first = setup.go()
    assert first.counters()["rows_done"] == 10
    flaky.bad = set()
    setup.engine = engine = FakeEngine(flaky)
    done = setup.go(retry=True)
    # Rows beyond the end of the data are not taken for dropped ones.
    assert engine.asked == ["q9"]
    assert (done.counters()["rows_ok"], done.counters()["rows_dropped"]) == (10, 0)
    assert len(done.store.units) == 4


def test_an_outage_of_the_fleet_is_waited_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spider_sdk.errors import FleetUnavailable
    from spider_worker.pipelines import calls
    from spider_worker.testing import LocalContext

    monkeypatch.setattr(calls, "_PAUSE", 0.001)
    failures = {"publish_journal": 2, "previous": 2, "event": 4, "add_units": 2}

    def failing(name: str) -> Any:
        plain = getattr(LocalContext, name)

        def call(self: LocalContext, *args: Any) -> Any:
            failures[name] -= 1
            if failures[name] >= 0:
                raise FleetUnavailable("Redis is down")
            return plain(self, *args)

        return call

    for name in failures:
        monkeypatch.setattr(LocalContext, name, failing(name))
    setup = Setup(tmp_path, engine=FakeEngine(Flaky(bad={"q2"})), shard_size=3)
    setup.source = InMemorySource(rows(10), stream=True)
    done = setup.go()
    assert done.counters()["rows_done"] == 10
    assert all(left < 0 for name, left in failures.items() if name != "event")
    assert failures["event"] == 0  # four events, none sent twice, and nothing waited for them
