"""A job that cannot even be begun fails with a reason, and its runner lives on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.errors import NotSupported
from spider_sdk.jobs import JobStatus, Queue
from spider_worker.fleet import Claim, Fleet
from spider_worker.runner import runner as runner_module
from spider_worker.runner.runner import Runner
from spider_worker.settings import WorkerSettings
from tests.support.jobs import openai_job, upload_rows


class Pipeline:
    grace = 5.0

    async def plan(self, ctx: Any) -> None:
        raise NotSupported("planned")


def begin(
    fleet: Fleet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[[Claim], Any],
    secrets: dict[str, str],
) -> tuple[str, list[str]]:
    """The job's id, and what the runner told its supervisor. ``build`` makes the pipeline."""
    told: list[str] = []
    monkeypatch.setattr(runner_module, "send", lambda _fd, op, **_fields: told.append(op))
    document = openai_job("http://127.0.0.1:9/v1", upload_rows(fleet, 3))
    job = fleet.jobs.submit("me", document, {}, queue=Queue.OFFLINE_GEN).job_id
    claim = fleet.units.claim(job, "h", ("plan",))
    assert isinstance(claim, Claim)
    monkeypatch.setattr(runner_module, "build_pipeline", lambda *_: build(claim))

    async def serve() -> None:
        runner = Runner(fleet, WorkerSettings(state=tmp_path), 0)
        await runner._begin(claim, {"document": document, "secrets": secrets})
        assert runner._live() == []

    asyncio.run(serve())
    return job, told


@pytest.mark.parametrize("broken", [ValueError, ImportError, KeyError])
def test_whatever_keeps_a_pipeline_from_being_built_fails_the_job(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: type[Exception]
) -> None:
    def build(_: Claim) -> None:
        raise broken("with canary-key in it")

    job, told = begin(fleet, tmp_path, monkeypatch, build, {"KEY": "canary-key"})
    found = fleet.jobs.get(job)
    assert found.status is JobStatus.FAILED
    assert found.error is not None
    assert f"{broken.__name__}: " in found.error
    assert "canary" not in found.error
    assert "ended" in told


def test_a_secret_that_no_environment_takes_leaves_nothing_of_the_others(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "operator's")
    secrets = {"MY_KEY": "job's", "OTHER": "a\0b"}
    job, _ = begin(fleet, tmp_path, monkeypatch, lambda _: Pipeline(), secrets)
    assert fleet.jobs.get(job).status is JobStatus.FAILED
    assert os.environ["MY_KEY"] == "operator's"


def test_a_claim_that_was_lost_meanwhile_is_left_alone(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(claim: Claim) -> None:
        fleet.units.release(claim, "the lease ran out")
        raise ValueError("late")

    job, told = begin(fleet, tmp_path, monkeypatch, build, {})
    assert "ended" in told
    assert fleet.jobs.get(job).status is not JobStatus.FAILED
