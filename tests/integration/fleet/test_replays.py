"""A script sent twice: redis-py repeats a command whose answer was cut off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from spider_sdk.jobs import JobStatus, Queue
from spider_worker.fleet import Claim, Fleet, NoUnit
from spider_worker.fleet.connection import Scripts

ALL = ("plan", "work", "publish", "finalise")
DOCUMENT = {"model": {"name": "m"}}


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every script runs twice; the caller gets the second answer, as after a cut connection."""
    run = Scripts.run

    def repeated(self: Scripts, name: str, *args: Any) -> Any:
        run(self, name, *args)
        return run(self, name, *args)

    monkeypatch.setattr(Scripts, "run", repeated)
    yield
    monkeypatch.undo()


def submit(fleet: Fleet, key: str | None = None) -> str:
    record = fleet.jobs.submit(
        "me", DOCUMENT, {"T": "value"}, queue=Queue.OFFLINE_GEN, idempotency_key=key
    )
    return record.job_id


def claim(fleet: Fleet, job: str) -> Claim:
    found = fleet.units.claim(job, "h", ALL)
    assert isinstance(found, Claim), found
    return found


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.usefixtures("twice")
def test_a_submit_is_accepted_once_hinted_at_and_mirrored(fleet: Fleet, key: str | None) -> None:
    job = submit(fleet, key)
    assert fleet.jobs.get(job).next_offset == 1
    assert len(fleet.jobs.list("me")[0]) == 1
    assert fleet.redis.llen("spider:offline-gen") == 1
    assert (fleet.artifacts.root / "jobs" / job / "job.json").is_file()


def test_a_submit_repeated_late_leaves_the_running_job_alone(fleet: Fleet) -> None:
    job = submit(fleet)
    claim(fleet, job)
    fleet.scripts.run(
        "submit", job, "me", "offline-gen", "{}", "hash", "", "", 10_000, b"other", 100
    )
    assert fleet.jobs.get(job).status is JobStatus.RUNNING
    assert fleet.jobs.get(job).document == DOCUMENT
    assert fleet.jobs.secrets(job) == {"T": "value"}


@pytest.mark.usefixtures("twice")
def test_a_whole_job_and_its_retry(fleet: Fleet) -> None:
    job = submit(fleet)
    plan = claim(fleet, job)
    units = [["u0", 0, "{}"], ["u1", 1, "{}"]]
    fleet.units.commit(plan, complete=True, counters={}, outcome={"units": units})
    first, second = claim(fleet, job), claim(fleet, job)
    assert (first.unit, second.unit) == ("u0", "u1")
    fleet.units.add(first, [("u2", 2, {})])
    fleet.units.progress(first, {"rows_done": 1}, {})
    fleet.units.commit(first, complete=True, counters={"rows_done": 3, "rows_error": 1})
    fleet.units.release(second, "stopped")
    for unit in ("u1", "u2"):
        held = claim(fleet, job)
        assert (held.unit, held.attempts) == (unit, 1)
        fleet.units.commit(held, complete=True, counters={"rows_done": 3})
    end = claim(fleet, job)
    assert end.kind == "finalise"
    fleet.units.commit(end, complete=True, counters={}, outcome={"message": "done"})
    assert fleet.jobs.get(job).metrics["rows_done"] == 9
    assert fleet.redis.hlen(f"spider:job:{job}:holders") == 0
    assert fleet.jobs.retry(job, env={"T": "new"}).status is JobStatus.QUEUED
    assert fleet.jobs.secrets(job) == {"T": "new"}
    assert claim(fleet, job).unit == "u0"
    assert isinstance(fleet.units.claim(job, "h", ALL), NoUnit)
    fleet.jobs.cancel(job)
