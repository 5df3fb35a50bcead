"""Local engines on the real fleet: loaded once, kept for the next job, refused in time."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.jobs import JobStatus
from tests.support.fleet_harness import Harness, eventually, start
from tests.support.jobs import upload_rows
from tests.support.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def harness(tmp_path: Path, model: Path) -> Iterator[Harness]:
    yield from start(
        tmp_path,
        SPIDER_DATA_ROOTS=str(model),
        SPIDER_LEASE="20",
        VLLM_CPU_KVCACHE_SPACE="1",
    )


def document(harness: Harness, provider: str, model: Path, **parameters: Any) -> dict[str, Any]:
    return {
        "model": {"provider": provider, "name": str(model), "parameters": parameters},
        "source": upload_rows(harness.fleet, 12),
        "generation": {"parameters": {"max_tokens": 4}},
        "shard_size": 5,
    }


ENGINES = [
    pytest.param("transformers", {}, id="transformers"),
    pytest.param(
        "vllm",
        {"enforce_eager": True, "max_model_len": 256},
        id="vllm",
        marks=[
            pytest.mark.vllm,
            pytest.mark.skipif(
                importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
            ),
        ],
    ),
]


@pytest.mark.parametrize(("provider", "parameters"), ENGINES)
def test_an_engine_serves_the_next_job_of_the_same_model(
    harness: Harness, model: Path, provider: str, parameters: dict[str, Any]
) -> None:
    worker = harness.worker()
    job = document(harness, provider, model, **parameters)
    first = harness.submit(job)
    record = harness.wait(first, seconds=180)
    assert record.status is JobStatus.COMPLETED, harness.story(first)
    assert len(harness.records(first)) == 12
    assert all(r["completion"] is not None for r in harness.records(first))
    runners = worker.runners()
    assert len(runners) == 1, "the runner waits for the next job"
    second = harness.submit(job)
    assert harness.wait(second, seconds=60).status is JobStatus.COMPLETED
    assert worker.runners() == runners, "the same process, with its engine, served it"
    changed = {"transformers": {"dtype": "float32"}, "vllm": {"max_model_len": 128}}[provider]
    other = harness.submit(document(harness, provider, model, **{**parameters, **changed}))
    eventually(lambda: worker.runners() and worker.runners() != runners, "a runner of its own", 60)
    assert harness.wait(other, seconds=180).status is JobStatus.COMPLETED, harness.story(other)


def test_an_idle_runner_ends_by_itself(harness: Harness, model: Path) -> None:
    harness.env["SPIDER_RUNNER_IDLE"] = "0.5"
    worker = harness.worker()
    job = harness.submit(document(harness, "transformers", model))
    assert harness.wait(job, seconds=120).status is JobStatus.COMPLETED, harness.story(job)
    eventually(lambda: not worker.runners(), "the idle runner's end", 30)


def test_more_devices_than_the_worker_has_fail_the_job_with_a_word(
    harness: Harness, model: Path
) -> None:
    harness.env["SPIDER_DEVICES"] = "0,1"
    harness.worker()
    job = harness.submit(document(harness, "transformers", model, device="cuda"))
    record = harness.wait(job, seconds=120)
    assert record.status is JobStatus.FAILED
    assert record.reason == "engine_unavailable", record.error
