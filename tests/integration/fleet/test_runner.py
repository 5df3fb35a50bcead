"""The runner's side of a claim, in this process, over a real Redis."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spider_sdk.config.model import SweConfig
from spider_sdk.errors import FatalJobError
from spider_sdk.jobs import JobStatus, Queue
from spider_worker.control import redact
from spider_worker.fleet import Claim, Fleet
from spider_worker.fleet.connection import Scripts
from spider_worker.pipelines import registry
from spider_worker.pipelines.base import Plan, UnitSpec
from spider_worker.runner import runner as runner_module
from spider_worker.runner.context import ClaimContext
from spider_worker.runner.runner import Runner
from spider_worker.settings import WorkerSettings
from tests.support.fleet_harness import eventually
from tests.support.jobs import openai_job, upload_rows


@pytest.fixture
def report() -> Iterator[int]:
    reading, writing = os.pipe()
    yield writing
    os.close(writing)
    os.close(reading)


@pytest.fixture
def document(fleet: Fleet) -> dict[str, Any]:
    return openai_job("http://127.0.0.1:9/v1", upload_rows(fleet, 3))


def planned(fleet: Fleet, document: dict[str, Any], units: int = 1) -> tuple[str, list[Claim]]:
    job = fleet.jobs.submit("me", document, {}, queue=Queue.OFFLINE_GEN).job_id
    specs = [[f"u{i}", i, "{}"] for i in range(units)]
    fleet.units.commit(take(fleet, job), complete=True, counters={}, outcome={"units": specs})
    return job, [take(fleet, job) for _ in range(units)]


def take(fleet: Fleet, job: str) -> Claim:
    found = fleet.units.claim(job, "h", ("plan", "work", "finalise"))
    assert isinstance(found, Claim)
    return found


def context(fleet: Fleet, claim: Claim, secrets: dict[str, str] | None = None) -> ClaimContext:
    session: Any = SimpleNamespace(job_id=claim.job_id, secrets=secrets or {})
    return ClaimContext(fleet, session, claim, lambda _: None)


def test_a_reader_with_an_old_manifest_finds_what_replaced_a_journal(
    fleet: Fleet, document: dict[str, Any]
) -> None:
    job, (first, second) = planned(fleet, document, units=2)
    for held in (first, second):
        ctx = context(fleet, held)
        ctx.open_journal().write_text(f'{{"id":"{held.unit}"}}\n')
        ctx.publish_journal()
    reading = fleet.results.records(job)
    assert next(reading) == b'{"id":"u0"}'
    # The reader knows u1 by its journal; the runner commits it and tidies up.
    done = context(fleet, second).scratch / "done.jsonl"
    done.write_text('{"id":"u1"}\n')
    entry = fleet.artifacts.adopt(second, done, name="shards/u1.jsonl", number=1)
    fleet.units.commit(second, complete=True, counters={}, manifest={entry.name: entry.to_text()})
    fleet.artifacts.drop_scratch(second)
    assert list(reading) == [b'{"id":"u1"}']


def test_previous_files_come_oldest_first(fleet: Fleet, document: dict[str, Any]) -> None:
    _, (held,) = planned(fleet, document)
    ctx = context(fleet, held)
    assert list(ctx.previous()) == []
    ctx.open_journal()
    ctx.publish_journal()
    assert [path.name for path in ctx.previous()] == ["journal.jsonl"]


def test_a_commit_tidies_up_after_every_attempt_of_its_unit(
    fleet: Fleet, document: dict[str, Any]
) -> None:
    job, (killed, other) = planned(fleet, document, units=2)
    context(fleet, killed).open_journal().write_text("left by a runner that was killed")
    fleet.units.release(killed, "killed")
    held = take(fleet, job)
    context(fleet, held).open_journal()
    context(fleet, other).open_journal()
    fleet.units.commit(held, complete=True, counters={})
    fleet.artifacts.drop_scratch(held)
    assert [path.name for path in fleet.artifacts.folder(job, "scratch").iterdir()] == [other.stem]


def test_the_data_of_events_is_redacted_too(fleet: Fleet, document: dict[str, Any]) -> None:
    job, (held,) = planned(fleet, document)
    data = {"error": "401 for canary-key", "tries": [{"url": "?k=canary-key", "n": 1}]}
    context(fleet, held, {"KEY": "canary-key"}).event("warning", "x", "canary-key", data)
    event = fleet.events.read(job).events[-1]
    assert event.message == "[KEY]"
    assert event.data == {"error": "401 for [KEY]", "tries": [{"url": "?k=[KEY]", "n": 1}]}


def test_redaction_takes_the_longest_and_every_line() -> None:
    secrets = {"A": "sk-abcdef", "B": "sk-abcdef-ghi", "PEM": "-----BEGIN-----\nMIIabc\n"}
    assert redact("sk-abcdef-ghi sk-abcdef", secrets) == "[B] [A]"
    assert redact("line 2: MIIabc", secrets) == "line 2: [PEM]"


def test_a_setting_that_hides_nothing_is_left_in_the_text() -> None:
    secrets = {"WANDB_MODE": "offline", "WANDB_API_KEY": "0123456789"}
    assert redact("offline, 0123456789", secrets) == "offline, [WANDB_API_KEY]"


def test_progress_of_many_units_is_two_events_a_second_of_all(
    fleet: Fleet, document: dict[str, Any]
) -> None:
    job, held = planned(fleet, document, units=20)
    for claim in held:
        fleet.units.progress(claim, {"rows_done": 1}, {})
    assert fleet.jobs.get(job).metrics["rows_done"] == 20
    codes = [event.code for event in fleet.events.read(job).events]
    assert codes.count("progress") < 20


def test_what_was_held_back_of_a_units_progress_is_told_later(
    fleet: Fleet, document: dict[str, Any]
) -> None:
    """Two units have something to say at once, and then nothing for a long time."""
    job, (loud, quiet) = planned(fleet, document, units=2)

    def told() -> list[str]:
        events = fleet.events.read(job).events
        return [event.data["unit"] for event in events if event.code == "progress"]

    async def report() -> None:
        assert fleet.units.progress(loud, {"rows_done": 1}, {})
        ctx = context(fleet, quiet)
        ctx.progress({"rows_done": 1}, {"turns": 3})
        async with asyncio.timeout(60):
            reporting = asyncio.create_task(ctx.report_progress())
            while quiet.unit not in told():  # noqa: ASYNC110 - another process would not set it
                await asyncio.sleep(0.02)
            reporting.cancel()

    asyncio.run(report())
    assert told() == [loud.unit, quiet.unit]


def test_the_operators_environment_comes_back_after_a_job(
    fleet: Fleet,
    document: dict[str, Any],
    report: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_KEY", "operator's")
    monkeypatch.delenv("OTHER_KEY", raising=False)

    async def serve() -> None:
        runner = Runner(fleet, WorkerSettings(state=tmp_path), report)
        secrets = {"MY_KEY": "job's", "OTHER_KEY": "job's"}
        job = {"document": document, "secrets": secrets}
        runner._session = runner._open_session("a", job)
        assert os.environ["MY_KEY"] == os.environ["OTHER_KEY"] == "job's"
        await runner._end_session()

    asyncio.run(serve())
    assert os.environ["MY_KEY"] == "operator's"
    assert "OTHER_KEY" not in os.environ


def test_a_cancel_does_not_wait_for_a_plan(
    fleet: Fleet,
    document: dict[str, Any],
    report: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planning has nothing to finish, and a source may take for ever to answer."""

    class Slow:
        grace = 600.0

        async def plan(self, ctx: Any) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(runner_module, "build_pipeline", lambda *_: Slow())
    job = fleet.jobs.submit("me", document, {}, queue=Queue.OFFLINE_GEN).job_id

    async def serve() -> None:
        runner = Runner(fleet, WorkerSettings(state=tmp_path), report)
        await runner._begin(take(fleet, job), {"document": document, "secrets": {}})
        (running,) = runner._live()
        await asyncio.sleep(0)
        fleet.jobs.cancel(job)
        runner._cancel()
        done, _ = await asyncio.wait({running.task}, timeout=30)
        assert done

    asyncio.run(serve())
    assert fleet.jobs.get(job).status is JobStatus.CANCELLED


@pytest.mark.parametrize("op", ["lost", "cancel"])
def test_a_word_that_lay_in_the_pipe_behind_a_unit_leaves_no_runner_waiting(
    fleet: Fleet,
    document: dict[str, Any],
    report: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    op: str,
) -> None:
    """A runner that starts slowly reads both at once: the unit's task is cancelled before its
    first step, and must still end its claim and ask for more."""

    class Slow:
        grace = 600.0

        async def plan(self, ctx: Any) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(runner_module, "build_pipeline", lambda *_: Slow())
    ended = asyncio.Event()
    monkeypatch.setattr(
        runner_module, "send", lambda _fd, op, **_fields: op == "ended" and ended.set()
    )
    job = fleet.jobs.submit("me", document, {}, queue=Queue.OFFLINE_GEN).job_id

    async def serve() -> None:
        runner = Runner(fleet, WorkerSettings(state=tmp_path), report)
        claim = take(fleet, job)
        unit = {"claim": claim.to_json(), "job": {"document": document, "secrets": {}}}
        await runner._on_message({"op": "unit", **unit})
        await runner._on_message({"op": op, "unit": claim.unit, "fence": claim.fence})
        await asyncio.wait_for(ended.wait(), 30)
        assert runner._live() == []

    asyncio.run(serve())


def test_the_reaper_outlives_a_sweep_that_fails(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps: list[int] = []
    run: Callable[..., Any] = Scripts.run

    def broken(self: Scripts, name: str, *args: Any) -> Any:
        sweeps.append(1)
        if len(sweeps) == 1:
            raise ValueError("something new")
        return run(self, name, *args)

    monkeypatch.setattr(Scripts, "run", broken)
    stop = threading.Event()
    thread = threading.Thread(target=fleet.reaper.run, args=(stop,))
    thread.start()
    eventually(lambda: len(sweeps) > 1, "another sweep")
    stop.set()
    thread.join(10)


@pytest.mark.parametrize("end", ["breaks", "is fatal", "is taken back"])
def test_what_an_attempt_spent_is_told_before_it_ends(
    fleet: Fleet, report: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Between two reports lies half a second, and what was spent in it would be given out again."""

    class Spending:
        grace = 5.0

        async def run(self, ctx: Any) -> None:
            assert (ctx.grant, ctx.job.llm_model) == (2.0, "m")
            ctx.progress({"cost_usd": 0.25})
            await asyncio.to_thread(eventually, lambda: "cost_usd" in metrics(), "the first report")
            ctx.progress({"cost_usd": 1.5})
            if end == "is taken back":
                raise asyncio.CancelledError
            raise FatalJobError("no") if end == "is fatal" else ValueError("no")

    def metrics() -> dict[str, Any]:
        return {k: v for k, v in fleet.jobs.get(job).metrics.items() if v is not None}

    monkeypatch.setattr(runner_module, "build_pipeline", lambda *_: Spending())
    document = {"swe": {"llm_model": "m", "max_budget_total": 9, "max_budget_per_instance": 2}}
    job, (held,) = planned(fleet, document)

    async def serve() -> None:
        runner = Runner(fleet, WorkerSettings(state=tmp_path), report)
        await runner._begin(held, {"document": document, "secrets": {}})
        (running,) = runner._live()
        await asyncio.wait({running.task}, timeout=30)

    asyncio.run(serve())
    assert metrics()["cost_usd"] == 1.5
    assert fleet.units.beat(job, [held]).lost == [held]


def test_no_more_hints_go_out_than_instances_may_begin(
    fleet: Fleet, report: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Planning:
        grace = 5.0

        async def plan(self, ctx: Any) -> Plan:
            return Plan([UnitSpec(f"u{i}", i, {}) for i in range(20)])

    monkeypatch.setattr(runner_module, "build_pipeline", lambda *_: Planning())
    document = {"swe": {"llm_model": "m", "num_workers": 4}}
    job = fleet.jobs.submit("me", document, {}, queue=Queue.SWE_AGENT).job_id
    fleet.redis.delete("spider:swe-agent")

    async def serve() -> None:
        runner = Runner(fleet, WorkerSettings(state=tmp_path), report)
        await runner._begin(take(fleet, job), {"document": document, "secrets": {}})
        (running,) = runner._live()
        await asyncio.wait({running.task}, timeout=30)

    asyncio.run(serve())
    assert fleet.redis.llen("spider:swe-agent") == 3


def test_a_swe_job_gets_its_own_pipeline() -> None:
    built = registry.build_pipeline(SweConfig("m"), WorkerSettings())
    assert type(built).__name__ == "SweAgentPipeline"
