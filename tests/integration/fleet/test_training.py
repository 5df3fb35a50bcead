"""Training on the real fleet: a runner trains the student, and what dies goes on."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.jobs import JobStatus, Queue
from tests.support.distil import Models, make_models, training_job
from tests.support.fleet_harness import Harness, eventually, start
from tests.support.jobs import upload_rows


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def harness(tmp_path: Path, models: Models) -> Iterator[Harness]:
    # Not the other tests' two seconds: while torch is imported a runner hears nothing for as long.
    yield from start(tmp_path, SPIDER_DATA_ROOTS=str(models.root), SPIDER_LEASE="12")


def job(harness: Harness, models: Models, *, rows: int = 82, **options: Any) -> dict[str, Any]:
    source = upload_rows(harness.fleet, rows, "count {} and more")
    return training_job(models, source=source, options=options)


def submit(harness: Harness, document: dict[str, Any]) -> str:
    return harness.submit(document, queue=Queue.ONPOLICY_TRAIN)


def steps_done(harness: Harness, job_id: str) -> float:
    return harness.fleet.jobs.get(job_id).metrics.get("steps_done") or 0


def artifact(harness: Harness, job_id: str, name: str) -> bytes:
    return harness.fleet.artifacts.open(job_id, name).read_bytes()


def curve(harness: Harness, job_id: str) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without what a clock measured."""
    lines = io.BytesIO(artifact(harness, job_id, "metrics.jsonl"))
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("seconds")}
        for line in lines
    ]


def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(harness: Harness, models: Models) -> None:
    document = job(harness, models, save_every=3, epochs=2)
    worker = harness.worker("-Q", "onpolicy-train")
    whole = submit(harness, document)
    assert harness.wait(whole).status is JobStatus.COMPLETED, harness.story(whole)
    broken = submit(harness, document)
    eventually(lambda: steps_done(harness, broken) >= 4, "four steps")
    worker.kill_all()
    assert steps_done(harness, broken) < 40
    harness.worker("-Q", "onpolicy-train")
    record = harness.wait(broken, seconds=180)
    assert record.status is JobStatus.COMPLETED, harness.story(broken)
    codes = [event.code for event in harness.fleet.events.read(broken).events]
    assert "train.resumed" in codes
    assert curve(harness, broken) == curve(harness, whole)
    assert [point["step"] for point in curve(harness, broken)] == list(range(41))
    name = "adapter/adapter_model.safetensors"
    assert artifact(harness, broken, name) == artifact(harness, whole, name)
    assert record.metrics["steps_done"] == 40
    # The result of a training run are the records of its steps, each once.
    assert [line["step"] for line in harness.records(broken)] == list(range(41))


def test_a_cancelled_run_keeps_its_last_step_and_a_retry_goes_on(
    harness: Harness, models: Models
) -> None:
    document = job(harness, models, rows=402)
    harness.worker("-Q", "gpu")
    running = submit(harness, document)
    eventually(lambda: steps_done(harness, running) >= 2, "two steps")
    harness.fleet.jobs.cancel(running)
    assert harness.wait(running).status is JobStatus.CANCELLED, harness.story(running)
    kept = curve(harness, running)[-1]["step"]
    assert 2 <= kept < 100
    checkpoint = f"checkpoints/step-{kept:06d}/adapter_model.safetensors"
    assert artifact(harness, running, checkpoint)
    assert artifact(harness, running, "curves.png").startswith(b"\x89PNG")
    harness.fleet.jobs.retry(running)
    eventually(lambda: steps_done(harness, running) > kept, "it goes on")
    harness.fleet.jobs.cancel(running)
    assert harness.wait(running).status is JobStatus.CANCELLED, harness.story(running)
    assert [point["step"] for point in curve(harness, running)][: kept + 2] == list(range(kept + 2))


def test_a_student_that_is_not_there_fails_the_job_before_the_first_step(
    harness: Harness, models: Models
) -> None:
    document = job(harness, models)
    document["model"]["name"] = str(models.root)
    harness.worker("-Q", "onpolicy-train")
    lost = submit(harness, document)
    record = harness.wait(lost)
    assert record.status is JobStatus.FAILED
    assert record.error is not None
    assert str(models.root) in record.error
    assert "steps_done" not in record.metrics
