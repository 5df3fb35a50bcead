"""What the fleet survives, with real workers, runners and Redis and a lease of two seconds.

Numbers are those of the faults in the fleet's design. The longer forms (twenty kills, every
crash point) are ``make chaos``; here is each fault at least once.
"""

from __future__ import annotations

import os
import random
import signal
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spider_sdk.jobs import JobStatus
from tests.support.figures import keep, percentile
from tests.support.fleet_harness import (
    ROOT,
    Harness,
    Worker,
    alive,
    children,
    eventually,
    kill,
    start,
)
from tests.support.jobs import check_rows, openai_job, upload_rows
from tests.support.openai_server import Script, ScriptedServer, running_server


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    yield from start(tmp_path)


@pytest.fixture
def endpoint() -> Iterator[ScriptedServer]:
    with running_server(Script(latency_ms=20)) as server:
        yield server


#: Rows between two kills: a unit that is killed again and again without progress is meant to
#: fail, which is fault 11 and not the others.
ENOUGH = 100


def await_progress(harness: Harness, job: str) -> None:
    """Wait until the job is ``ENOUGH`` rows further, or has ended."""
    goal = rows_done(harness, job) + ENOUGH
    eventually(
        lambda: rows_done(harness, job) >= goal or harness.fleet.jobs.get(job).status.is_terminal,
        "progress",
    )


def seconds_to_claim(harness: Harness, job: str, since: int | None = None) -> float:
    """From now until a unit of the job is claimed (with an event from ``since`` on, None: from
    now on), or the job has ended."""
    began = time.monotonic()
    since = harness.fleet.jobs.get(job).next_offset if since is None else since

    def claimed() -> bool:
        codes = [event.code for event in harness.fleet.events.read(job, since=since).events]
        return "unit.claimed" in codes or harness.fleet.jobs.get(job).status.is_terminal

    eventually(claimed, "the job goes on")
    return time.monotonic() - began


def resume_figures(seconds: list[float]) -> dict[str, float]:
    return {
        "kills": len(seconds),
        "resume_p50": percentile(seconds, 0.5),
        "resume_p95": percentile(seconds, 0.95),
        "resume_max": max(seconds),
    }


def rows_done(harness: Harness, job: str) -> float:
    return harness.fleet.jobs.get(job).metrics.get("rows_done", 0)


def test_a_job_from_submit_to_result(harness: Harness, endpoint: ScriptedServer) -> None:
    harness.worker()
    job = harness.submit(
        openai_job(endpoint.base_url, upload_rows(harness.fleet, 100), shard_size=30)
    )
    record = harness.wait(job)
    assert record.status is JobStatus.COMPLETED, harness.story(job)
    check_rows(harness.records(job), 100)
    assert [r["index"] for r in harness.records(job)] == list(range(100))
    assert record.metrics["rows_ok"] == record.metrics["rows_total"] == 100


def test_several_workers_share_one_job(harness: Harness, endpoint: ScriptedServer) -> None:
    endpoint.script.latency_ms = 100
    workers = [harness.worker(), harness.worker()]
    source = upload_rows(harness.fleet, 1200)
    job = harness.submit(openai_job(endpoint.base_url, source, shard_size=100, in_flight=16))
    eventually(lambda: all(w.runners() for w in workers), "both workers at work", 60)
    assert harness.wait(job).status is JobStatus.COMPLETED
    check_rows(harness.records(job), 1200)
    # A holder is worker-and-runner: a worker whose runner waited without a unit for a moment
    # takes the job up again under another name, and it is workers that are counted here.
    holders = [
        e.data["holder"] for e in harness.fleet.events.read(job).events if e.code == "unit.claimed"
    ]
    assert len({holder.rpartition("-")[0] for holder in holders}) == 2


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.chaos)])
def test_1_worker_kills_lose_and_double_nothing(
    harness: Harness, endpoint: ScriptedServer, kills: int
) -> None:
    rows = 1000 if kills == 2 else 10_000
    source = upload_rows(harness.fleet, rows)
    job = harness.submit(openai_job(endpoint.base_url, source, shard_size=400, parallelism=1))
    workers = [harness.worker(), harness.worker()]
    generator = random.Random(7)
    resumes = []
    for _ in range(kills):
        await_progress(harness, job)
        busy = eventually(
            lambda: next((worker for worker in workers if worker.runners()), None), "a runner"
        )
        time.sleep(generator.random() * 0.3)  # the moment of the kill is what is random here
        busy.kill_all()
        resumes.append(seconds_to_claim(harness, job))
        workers.remove(busy)
        workers.append(harness.worker())
    assert harness.wait(job, seconds=240).status is JobStatus.COMPLETED, harness.story(job)
    check_rows(harness.records(job), rows)
    repeated = endpoint.counts.requests - rows
    assert repeated <= kills * 64, "more than what was in flight is repeated"
    keep("1: worker kills", **resume_figures(resumes), repeated=repeated)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.chaos)])
def test_2_runner_kills_are_retried(harness: Harness, endpoint: ScriptedServer, kills: int) -> None:
    rows = 1500 if kills == 2 else 10_000
    worker = harness.worker()
    job = harness.submit(
        openai_job(endpoint.base_url, upload_rows(harness.fleet, rows), shard_size=400)
    )
    resumes = []
    for _ in range(kills):
        await_progress(harness, job)
        for pid in worker.runners():
            kill(pid)
        resumes.append(seconds_to_claim(harness, job))
    assert harness.wait(job, seconds=240).status is JobStatus.COMPLETED, harness.story(job)
    check_rows(harness.records(job), rows)
    keep("2: runner kills", **resume_figures(resumes))
    codes = [event.code for event in harness.fleet.events.read(job).events]
    assert "unit.retrying" in codes


@pytest.mark.parametrize("times", [1, pytest.param(5, marks=pytest.mark.chaos)])
def test_3_a_stopped_supervisor_leaves_one_runner(
    harness: Harness, endpoint: ScriptedServer, times: int
) -> None:
    rows = 1500 * times
    workers = [harness.worker(), harness.worker()]
    source = upload_rows(harness.fleet, rows)
    job = harness.submit(openai_job(endpoint.base_url, source, in_flight=8, parallelism=1))

    def at_work() -> Worker | None:
        return next((worker for worker in workers if worker.runners()), None)

    for _ in range(times):
        stopped = eventually(at_work, "a worker at work", 20)
        await_progress(harness, job)
        (runner,) = stopped.runners()
        stopped.signal(signal.SIGSTOP)
        # Nobody else claims while the first runner lives: it must end before its lease does.
        eventually(lambda runner=runner: not alive(runner), "the runner's own end", 5)
        eventually(at_work, "another worker at work", 20)
        stopped.signal(signal.SIGCONT)
    assert harness.wait(job, seconds=240).status is JobStatus.COMPLETED, harness.story(job)
    check_rows(harness.records(job), rows)


def test_4_a_whole_group_that_wakes_past_its_lease_is_refused(
    harness: Harness, endpoint: ScriptedServer
) -> None:
    sleeper = harness.worker()
    source = upload_rows(harness.fleet, 1000)
    job = harness.submit(openai_job(endpoint.base_url, source, in_flight=8, shard_size=1000))
    eventually(lambda: rows_done(harness, job) > 0, "progress")
    pids = [sleeper.pid, *children(sleeper.pid)]
    for pid in pids:
        kill(pid, signal.SIGSTOP)
    other = harness.worker()
    eventually(other.runners, "another worker at work", 20)
    for pid in pids:
        kill(pid, signal.SIGCONT)
    assert harness.wait(job).status is JobStatus.COMPLETED
    check_rows(harness.records(job), 1000)
    committed = [e for e in harness.fleet.events.read(job).events if e.code == "unit.committed"]
    assert len(committed) == 1


@pytest.mark.parametrize("times", [1, pytest.param(5, marks=pytest.mark.chaos)])
def test_5_redis_dies_and_comes_back(
    harness: Harness, endpoint: ScriptedServer, times: int
) -> None:
    rows = 1500 * times
    harness.worker()
    job = harness.submit(
        openai_job(endpoint.base_url, upload_rows(harness.fleet, rows), in_flight=8)
    )
    resumes = []
    for _ in range(times):
        await_progress(harness, job)
        harness.redis.stop(signal.SIGKILL)
        harness.redis.start()
        began = time.monotonic()
        await_progress(harness, job)
        resumes.append(time.monotonic() - began)
    assert harness.wait(job, seconds=240).status is JobStatus.COMPLETED, harness.story(job)
    check_rows(harness.records(job), rows)
    keep("5: Redis kills", **resume_figures(resumes))


def test_5_an_outage_under_half_a_lease_restarts_nothing(
    tmp_path: Path, endpoint: ScriptedServer
) -> None:
    # A longer lease, so that even a slow restart of Redis stays under half of it.
    for harness in start(tmp_path, SPIDER_LEASE="20"):
        worker = harness.worker()
        source = upload_rows(harness.fleet, 2000)
        job = harness.submit(openai_job(endpoint.base_url, source, in_flight=8, shard_size=2000))
        await_progress(harness, job)
        runners = worker.runners()
        harness.redis.stop(signal.SIGKILL)
        harness.redis.start()
        assert harness.wait(job).status is JobStatus.COMPLETED, harness.story(job)
        check_rows(harness.records(job), 2000)
        assert worker.runners() == runners
        events = harness.fleet.events.read(job).events
        claims = [event.data["unit"] for event in events if event.code == "unit.claimed"]
        assert len(claims) == len(set(claims)), "no unit was begun twice"
        assert endpoint.counts.requests == 2000, "no row was asked for twice"


def test_7_a_hundred_queued_jobs_survive_the_loss_of_the_brokers_keys(
    harness: Harness, endpoint: ScriptedServer
) -> None:
    source = upload_rows(harness.fleet, 3)
    jobs = [harness.submit(openai_job(endpoint.base_url, source)) for _ in range(100)]
    redis = harness.fleet.redis
    broker = ["spider:offline-gen", *redis.keys("spider:_kombu*"), *redis.keys("spider:unacked*")]
    redis.delete(*broker)
    harness.worker()
    for job in jobs:
        assert harness.wait(job, seconds=120).status is JobStatus.COMPLETED


def test_8_fifty_hints_make_one_attempt(harness: Harness, endpoint: ScriptedServer) -> None:
    job = harness.submit(openai_job(endpoint.base_url, upload_rows(harness.fleet, 50)))
    for _ in range(50):
        harness.fleet.hints.publish(job, "offline-gen")
    harness.worker()
    harness.worker()
    assert harness.wait(job).status is JobStatus.COMPLETED
    claims = [
        e.data["unit"] for e in harness.fleet.events.read(job).events if e.code == "unit.claimed"
    ]
    assert len(claims) == len(set(claims))
    assert endpoint.counts.requests == 50


def crashing(harness: Harness, at: int, count: Path | None = None) -> Path:
    """Make the harness's runners crash once, at that point; returns the crash's mark."""
    mark = harness.folder / f"crashed-{at}"
    script = harness.folder / f"python-{at}"
    script.write_text(
        f"#!/bin/sh\nshift 2\ncd {ROOT}\nCRASH_AT={at} CRASH_FILE={mark} CRASH_COUNT={count or ''} "
        f'exec {sys.executable} -m tests.support.crashing_runner "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    harness.env["SPIDER_PYTHON_OFFLINE_GEN"] = str(script)
    harness.env["SPIDER_RUNNER_IDLE"] = "0"
    return mark


@pytest.mark.parametrize(
    "every", [pytest.param(9, id="sample"), pytest.param(1, marks=pytest.mark.chaos, id="all")]
)
def test_10_a_crash_at_every_script_and_write_is_passed(
    harness: Harness, endpoint: ScriptedServer, every: int
) -> None:
    endpoint.script.latency_ms = 0
    source = upload_rows(harness.fleet, 20)
    document = openai_job(endpoint.base_url, source, shard_size=10)
    count = harness.folder / "count"
    crashing(harness, 0, count)
    worker = harness.worker()
    assert harness.wait(harness.submit(document)).status is JobStatus.COMPLETED
    points = int(eventually(lambda: count.exists() and count.read_text(), "the count"))
    worker.stop()
    assert points > 20
    names = []
    for at in range(1, points + 1, every):
        mark = crashing(harness, at)
        worker = harness.worker()
        job = harness.submit(document)
        assert harness.wait(job).status is JobStatus.COMPLETED, (at, harness.story(job))
        check_rows(harness.records(job), 20)
        if mark.exists():
            names.append(mark.read_text())
        worker.stop()
    assert names, "no point was reached"
    keep("10: crash points", points=points, tried=len(range(1, points + 1, every)), hit=len(names))


def test_11_a_poison_runner_fails_after_its_attempts_and_others_go_on(
    harness: Harness, endpoint: ScriptedServer
) -> None:
    poison, script = harness.folder / "poison", harness.folder / "python"
    poison.touch()
    script.write_text(f'#!/bin/sh\n[ -e {poison} ] && kill -9 $$\nexec {sys.executable} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    harness.env["SPIDER_PYTHON_OFFLINE_GEN"] = str(script)
    harness.worker()
    source = upload_rows(harness.fleet, 3)
    job = harness.submit(openai_job(endpoint.base_url, source))
    record = harness.wait(job)
    assert (record.status, record.reason) == (JobStatus.FAILED, "attempts_exhausted")
    claims = [e for e in harness.fleet.events.read(job).events if e.code == "unit.claimed"]
    assert len(claims) == harness.fleet.settings.max_attempts
    # The same worker takes the next job: nothing of the poison sticks to it.
    poison.unlink()
    healthy = harness.submit(openai_job(endpoint.base_url, source))
    keep("11: poison", healthy_claimed=seconds_to_claim(harness, healthy, since=0))
    assert harness.wait(healthy).status is JobStatus.COMPLETED, harness.story(healthy)


def test_12_cancel_keeps_what_is_finished_and_leaves_no_process(
    harness: Harness, endpoint: ScriptedServer
) -> None:
    worker = harness.worker()
    source = upload_rows(harness.fleet, 3000)
    job = harness.submit(openai_job(endpoint.base_url, source, in_flight=8))
    eventually(lambda: rows_done(harness, job) > 20, "progress")
    began = time.monotonic()
    harness.fleet.jobs.cancel(job)
    assert harness.wait(job, seconds=60).status is JobStatus.CANCELLED
    keep("12: cancel of a running job", seconds=time.monotonic() - began)
    kept = harness.records(job)
    assert 20 < len(kept) < 3000
    assert len({record["id"] for record in kept}) == len(kept)
    harness.fleet.jobs.retry(job)
    assert harness.wait(job).status is JobStatus.COMPLETED
    check_rows(harness.records(job), 3000)
    assert endpoint.counts.requests <= 3000 + 8, "finished rows are not asked for again"
    worker.stop()
    eventually(lambda: not worker.runners(), "no runner is left")


def test_12_a_stubborn_runner_is_killed_with_its_children(harness: Harness) -> None:
    script = harness.folder / "stubborn"
    script.write_text("#!/bin/sh\ntrap '' TERM\nsleep 600 &\nwhile :; do sleep 1; done\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    harness.env["SPIDER_PYTHON_OFFLINE_GEN"] = str(script)
    worker = harness.worker()
    job = harness.submit(openai_job("http://127.0.0.1:9/v1", upload_rows(harness.fleet, 3)))
    started = eventually(
        lambda: [p for p in children(worker.pid) if os.getpgid(p) != worker.pid], "a runner"
    )
    began = time.monotonic()
    harness.fleet.jobs.cancel(job)
    assert harness.wait(job, seconds=60).status is JobStatus.CANCELLED
    eventually(lambda: not any(map(alive, started)), "no process is left")
    keep("12: cancel of a stubborn runner", seconds=time.monotonic() - began)


def test_15_secrets_are_found_nowhere(harness: Harness) -> None:
    canary = "sk-canary-5f2a7c"
    with running_server(Script(api_key=canary)) as endpoint:
        harness.worker()
        source = upload_rows(harness.fleet, 30)
        document = openai_job(endpoint.base_url, source)
        document["model"]["api_key_env"] = "MY_KEY"
        job = harness.submit(document, {"MY_KEY": canary, "OTHER": canary + "-2"})
        wrong = harness.submit(document, {"MY_KEY": canary + "-3"})
        assert harness.wait(job).status is JobStatus.COMPLETED, harness.story(job)
        assert harness.wait(wrong).status is JobStatus.FAILED
        queued = harness.submit({**document, "parallelism": 1}, {"MY_KEY": canary + "-4"})
        # A snapshot as well as the log, and uncompressed: a canary must not hide in it.
        harness.fleet.redis.config_set("rdbcompression", "no")
        harness.fleet.redis.save()
        assert queued.encode() in (harness.folder / "redis" / "dump.rdb").read_bytes()
        harness.wait(queued)
    harness.redis.stop()
    for path in harness.folder.rglob("*"):
        if path.is_file():
            assert canary.encode() not in path.read_bytes(), path


def test_a_worker_that_shuts_down_gives_its_units_back(
    harness: Harness, endpoint: ScriptedServer
) -> None:
    first = harness.worker()
    job = harness.submit(
        openai_job(endpoint.base_url, upload_rows(harness.fleet, 2000), in_flight=8)
    )
    eventually(lambda: rows_done(harness, job) > 0, "progress")
    first.stop()
    codes = [event.code for event in harness.fleet.events.read(job).events]
    assert "unit.released" in codes, harness.story(job)
    harness.worker()
    assert harness.wait(job).status is JobStatus.COMPLETED
    check_rows(harness.records(job), 2000)


def test_an_attempt_that_broke_leaves_no_engine_to_the_next(
    harness: Harness, endpoint: ScriptedServer
) -> None:
    """An input that is not there yet breaks the attempt; once it is, the job goes on."""
    source = upload_rows(harness.fleet, 50)
    path = harness.fleet.inputs.path(source["inputs"][0]["sha256"])
    scratch = harness.folder / "artifacts" / "jobs"
    job = harness.submit(openai_job(endpoint.base_url, source, shard_size=10))
    # A file where the unit's scratch folder would be: an OSError from the middle of an attempt.
    (scratch / job).mkdir(exist_ok=True)
    (scratch / job / "scratch").write_text("in the way")
    harness.worker()
    eventually(
        lambda: "unit.retrying" in [e.code for e in harness.fleet.events.read(job).events],
        "a broken attempt",
    )
    (scratch / job / "scratch").unlink()
    assert path.is_file()
    assert harness.wait(job).status is JobStatus.COMPLETED, harness.story(job)
    check_rows(harness.records(job), 50)


def test_a_worker_that_ends_leaves_no_idle_runner(
    harness: Harness, endpoint: ScriptedServer
) -> None:
    worker = harness.worker()
    job = harness.submit(openai_job(endpoint.base_url, upload_rows(harness.fleet, 5)))
    harness.wait(job)
    (runner,) = worker.runners()
    worker.stop()
    assert not alive(runner)
