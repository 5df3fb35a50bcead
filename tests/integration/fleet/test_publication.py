"""Jobs that publish, over the real fleet and the real Hub client, to an emulated Hub."""

from __future__ import annotations

import collections
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from spider_sdk.jobs import JobStatus
from tests.support.fleet_harness import Harness, eventually, start
from tests.support.hub_emulator import READ_TOKEN, USER, WRITE_TOKEN, HubEmulator
from tests.support.hub_loader import HubLoader
from tests.support.jobs import openai_job, upload_rows
from tests.support.openai_server import Script, ScriptedServer, running_server

REPO = f"{USER}/rollouts"


@pytest.fixture
def hub() -> Iterator[HubEmulator]:
    with HubEmulator() as hub:
        yield hub


@pytest.fixture
def harness(tmp_path: Path, hub: HubEmulator) -> Iterator[Harness]:
    yield from start(
        tmp_path,
        HF_ENDPOINT=hub.endpoint,
        HF_HUB_DISABLE_XET="1",
        HF_HOME=str(tmp_path / "hf"),
    )


@pytest.fixture
def endpoint() -> Iterator[ScriptedServer]:
    with running_server(Script(latency_ms=5)) as server:
        yield server


def document(endpoint: ScriptedServer, source: dict[str, Any], **generation: Any) -> dict[str, Any]:
    job = openai_job(endpoint.base_url, source, shard_size=50)
    job["output"] = {"mode": "upload_hf", "hf": {"repo_id": REPO, "repo_type": "dataset"}}
    job["generation"].update(generation)
    return job


def published(hub: HubEmulator) -> list[dict[str, Any]]:
    repo = hub.repo(REPO)
    rows: list[dict[str, Any]] = []
    for path, data in sorted(repo.files.items()):
        if path.endswith(".parquet"):
            rows += pq.read_table(io.BytesIO(data.content)).to_pylist()
    return rows


def check_published(hub: HubEmulator, count: int) -> None:
    found = collections.Counter(row["index"] for row in published(hub))
    assert sorted(found) == list(range(count))
    assert set(found.values()) == {1}


def test_a_job_publishes_while_it_runs_and_at_its_end(
    harness: Harness, hub: HubEmulator, endpoint: ScriptedServer
) -> None:
    endpoint.script.latency_ms = 200
    harness.worker()
    source = upload_rows(harness.fleet, 500)
    job = harness.submit(
        document(endpoint, source, upload_every=50, max_batch_size=16), {"HF_TOKEN": WRITE_TOKEN}
    )
    eventually(
        lambda: hub.count("commit") and published(hub), "rows on the Hub while the job runs", 60
    )
    assert not harness.fleet.jobs.get(job).status.is_terminal
    record = harness.wait(job)
    assert record.status is JobStatus.COMPLETED, harness.story(job)
    check_published(hub, 500)
    assert (record.remote_artifact or "").endswith(REPO)
    with HubLoader(hub.endpoint, harness.folder / "reader", WRITE_TOKEN) as loader:
        assert len(loader.load(REPO, "default")["rows"]) == 500


def test_a_token_that_may_not_write_fails_before_the_first_row(
    harness: Harness, endpoint: ScriptedServer
) -> None:
    harness.worker()
    source = upload_rows(harness.fleet, 20)
    job = harness.submit(document(endpoint, source), {"HF_TOKEN": READ_TOKEN})
    record = harness.wait(job)
    assert (record.status, record.reason) == (JobStatus.FAILED, "auth_error")
    assert endpoint.counts.requests == 0


def test_a_kill_while_publishing_duplicates_nothing(
    harness: Harness, hub: HubEmulator, endpoint: ScriptedServer
) -> None:
    # The second commit is applied and its answer never comes: the publisher dies waiting.
    hub.fault("commit", "hang_after", nth=2)
    worker = harness.worker()
    source = upload_rows(harness.fleet, 300)
    job = harness.submit(document(endpoint, source), {"HF_TOKEN": WRITE_TOKEN})
    eventually(lambda: hub.count("commit") >= 2, "the second commit", 60)
    worker.kill_all()
    harness.worker()
    assert harness.wait(job).status is JobStatus.COMPLETED, harness.story(job)
    check_published(hub, 300)


def test_error_rows_stay_off_the_hub_and_a_retry_adds_them(
    harness: Harness, hub: HubEmulator, endpoint: ScriptedServer
) -> None:
    harness.worker()
    text = "row {} [[400]]"
    source = upload_rows(harness.fleet, 3, text)
    bad = harness.submit(document(endpoint, source), {"HF_TOKEN": WRITE_TOKEN})
    assert harness.wait(bad).status is JobStatus.FAILED, "no good row at all"
    mixed = _mixed_rows(harness)
    job = harness.submit(document(endpoint, mixed), {"HF_TOKEN": WRITE_TOKEN})
    record = harness.wait(job)
    assert record.status is JobStatus.COMPLETED, harness.story(job)
    assert record.metrics["rows_error"] == 3
    assert [row["index"] for row in published(hub)] == list(range(3, 60))
    assert sum(r["error"] is not None for r in harness.records(job)) == 3
    # The rows fail once more: [[400:2]] is well from the third request on.
    harness.fleet.jobs.retry(job, env={"HF_TOKEN": WRITE_TOKEN})
    harness.wait(job)
    harness.fleet.jobs.retry(job, env={"HF_TOKEN": WRITE_TOKEN})
    record = harness.wait(job)
    assert record.status is JobStatus.COMPLETED, harness.story(job)
    assert record.metrics["rows_error"] == 0
    check_published(hub, 60)
    assert endpoint.counts.requests == 3 + 60 + 3 + 3, "good rows are asked for once"


def _mixed_rows(harness: Harness) -> dict[str, Any]:
    import hashlib
    import json

    lines = [{"prompt": f"row {i}" + (" [[400:2]]" if i < 3 else "")} for i in range(60)]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    digest = hashlib.sha256(data).hexdigest()
    harness.fleet.inputs.put(digest, io.BytesIO(data))
    return {
        "dataset": "mixed.jsonl",
        "field": "prompt",
        "inputs": [{"name": "mixed.jsonl", "sha256": digest}],
    }
