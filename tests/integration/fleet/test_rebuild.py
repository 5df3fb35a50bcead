"""Redis wiped: jobs come back from what lies beside their artifacts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from spider_sdk.cli.main import run
from spider_sdk.jobs import JobStatus
from spider_worker.fleet.rebuild import rebuild
from tests.support.fleet_harness import Harness, eventually, start
from tests.support.jobs import check_rows, openai_job, upload_rows
from tests.support.openai_server import Script, ScriptedServer, running_server


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    yield from start(tmp_path)


@pytest.fixture
def endpoint() -> Iterator[ScriptedServer]:
    with running_server(Script(latency_ms=20)) as server:
        yield server


def test_a_wiped_redis_costs_what_was_in_flight(
    harness: Harness,
    endpoint: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    worker = harness.worker()
    fleet = harness.fleet
    done = harness.submit(openai_job(endpoint.base_url, upload_rows(fleet, 30), shard_size=10))
    before = harness.wait(done)
    assert before.status is JobStatus.COMPLETED, harness.story(done)
    records = harness.records(done)
    asked = endpoint.counts.requests
    running = harness.submit(
        openai_job(endpoint.base_url, upload_rows(fleet, 1000), shard_size=50, in_flight=8)
    )
    manifest = harness.folder / "artifacts" / "jobs" / running / "manifest"
    eventually(lambda: manifest.is_dir() and len(list(manifest.glob("rows-*.json"))) >= 4, "units")
    worker.kill_all()
    fleet.redis.flushall()
    (manifest / "torn.json").write_text('{"unit": ')
    monkeypatch.setenv("SPIDER_REDIS_URL", harness.env["SPIDER_REDIS_URL"])
    monkeypatch.setenv("SPIDER_ARTIFACTS", harness.env["SPIDER_ARTIFACTS"])
    assert run(["rebuild", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["rebuilt"]) == {done, running}
    assert rebuild(fleet) == [], "what is there stays as it is"

    after = fleet.jobs.get(done)
    assert (after.status, after.document) == (JobStatus.COMPLETED, before.document)
    assert after.submitted_at == before.submitted_at
    assert after.metrics == before.metrics
    assert harness.records(done) == records
    lost = fleet.jobs.get(running)
    assert (lost.status, lost.reason) == (JobStatus.FAILED, "redis_lost")
    kept = len(harness.records(running))
    assert kept >= 200
    assert {job.job_id for job in fleet.jobs.list("me")[0]} == {done, running}

    served = endpoint.counts.requests
    harness.worker()
    fleet.jobs.retry(running)
    assert harness.wait(running).status is JobStatus.COMPLETED, harness.story(running)
    check_rows(harness.records(running), 1000)
    assert asked < served
    assert endpoint.counts.requests - served == 1000 - kept, "only what is missing is asked for"
