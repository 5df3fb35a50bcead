"""A SWE job on a real fleet: workers, runners, claims; only its agents are pretended."""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.jobs import JobStatus, Queue
from spider_worker.fleet import NoUnit
from tests.support.fleet_harness import ROOT, Harness, eventually, start
from tests.support.swe_runner import lines


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    yield from start(tmp_path)


@pytest.fixture
def log(harness: Harness) -> Path:
    """Has the harness's SWE runners pretend; where they write what they do."""
    script = harness.folder / "python"
    script.write_text(
        f'#!/bin/sh\nshift 2\ncd {ROOT}\nexec {sys.executable} -m tests.support.swe_runner "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    harness.env["SPIDER_PYTHON_SWE_AGENT"] = str(script)
    harness.env["SWE_GATE"] = str(gate(harness))
    harness.env["SWE_LOG"] = str(harness.folder / "log")
    return harness.folder / "log"


def gate(harness: Harness) -> Path:
    """Instances end once this file is there."""
    return harness.folder / "gate"


def submit(harness: Harness, **swe: Any) -> str:
    document = {"swe": {"llm_model": "m", **swe}}
    return harness.submit(document, {"KEY": "k"}, queue=Queue.SWE_AGENT)


def test_num_workers_instances_at_a_time_over_two_workers(harness: Harness, log: Path) -> None:
    harness.worker("-Q", "swe-agent")
    harness.worker("-Q", "swe-agent")
    job = submit(harness, max_instances=12, num_workers=3)
    live = f"spider:job:{job}:live"
    redis = harness.fleet.redis
    eventually(lambda: len(lines(log)) == 3 and redis.scard(live) == 3, "three instances at work")
    assert isinstance(harness.fleet.units.claim(job, "another", ("work",)), NoUnit)
    gate(harness).touch()
    record = harness.wait(job)
    assert record.status is JobStatus.COMPLETED, harness.story(job)
    assert (record.metrics["rows_done"], record.metrics["cost_usd"]) == (12, 12)
    assert len(harness.records(job)) == 12
    at_work, most = set(), 0
    for event in harness.fleet.events.read(job).events:
        if event.code == "unit.claimed" and event.data["kind"] == "work":
            at_work.add(event.data["unit"])
        elif event.code == "unit.committed":
            at_work.discard(event.data["unit"])
        most = max(most, len(at_work))
    assert most == 3


def test_a_budget_ends_a_job_and_a_larger_one_goes_on(harness: Harness, log: Path) -> None:
    gate(harness).touch()
    harness.worker("-Q", "swe-agent")
    job = submit(
        harness, max_instances=6, num_workers=2, max_budget_total=3.5, max_budget_per_instance=1
    )
    record = harness.wait(job)
    assert record.status is JobStatus.COMPLETED, harness.story(job)
    assert record.metrics["cost_usd"] == 3
    assert record.metrics["units_skipped"] == 3
    assert [words[2] for words in lines(log)] == ["1.0"] * 3
    harness.fleet.jobs.retry(job, env={"KEY": "k"}, budget=6.0)
    record = harness.wait(job)
    assert (record.metrics["cost_usd"], len(harness.records(job))) == (6, 6), harness.story(job)
