"""What becomes of a run that is paid for while, and where, it cannot be judged."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.errors import EngineUnavailable, WorkspaceError
from spider_worker.evaluation.judge import Judge
from spider_worker.pipelines.swe_agent.pipeline import SweAgentPipeline
from spider_worker.swe_tasks.base import Task
from tests.contract.swe_agent.conftest import Job, Warm, mending
from tests.support.boxes import alive
from tests.support.swe_repos import SweRepo

_NUMBERS = itertools.count()


class Slow(Job):
    """A job whose task's tests take a minute, until ``quick``."""

    def start(self) -> Slow:
        self.marker = f"60.{os.getpid()}{next(_NUMBERS)}1"
        self.quick = self.repos
        self.repos = [dataclasses.replace(r, test_cmd=f"sleep {self.marker}") for r in self.repos]
        return self

    def lose(self, **changes: Any) -> None:
        """Until the tests of the first judgement run."""
        self.break_off(lambda: alive(self.marker), evaluate=True, **changes)
        assert not alive(self.marker)


def slow(folder: Path, warm: Warm, repo: SweRepo, python: str) -> Slow:
    return Slow(folder, warm, [repo], python, {repo.folder.name: mending(repo)}).start()


def test_a_worker_lost_while_it_judges_loses_no_run(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str
) -> None:
    job = slow(folder, warm, repos[0], python)
    job.lose()
    job.repos = job.quick
    (record,) = job.run(evaluate=True)
    assert job.model is not None
    assert not job.model.requests, "the agent ran again"
    assert (record["status"], record["attempt"], record["resolved"]) == ("finished", 1, True)
    assert record["test_result"]["report"]["resolved"] is True
    log = (folder / f"job/artifacts/infer_logs/instance_{repos[0].instance_id}.log").read_text()
    assert log.count("attempt 1 ends: finished") == 1
    assert "git apply" in log
    assert log.rstrip().endswith("judged: resolved")


def test_a_verdict_outlives_the_worker_that_gave_it(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost between the verdict and the end of its unit."""

    async def lost(*_: Any) -> None:
        raise WorkspaceError("lost")

    async def refuse(*_: Any) -> None:
        raise AssertionError("it was judged again")

    repo = repos[0]
    job = Job(folder, warm, [repo], python, {repo.folder.name: mending(repo)}, {"evaluate": True})
    with monkeypatch.context() as patch:
        patch.setattr(SweAgentPipeline, "_outcome", lost)
        with pytest.raises(WorkspaceError, match="lost"):
            job.run()
    monkeypatch.setattr(Judge, "judge", refuse)
    (record,) = job.run()
    assert (record["resolved"], record["report"]["resolved"]) == (True, True)


def test_a_cancel_ends_a_judgement_and_keeps_the_run(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str
) -> None:
    job = slow(folder, warm, repos[0], python)
    job.lose(cancel=True)
    (shard,) = job.store.shards()
    (record,) = [json.loads(line) for line in shard.path.read_text().splitlines()]
    assert not shard.complete
    assert (record["status"], record["resolved"], record["report"]) == ("finished", None, None)
    assert "diff" in record["test_result"]["git_patch"]
    # Taken up again, it is judged, and no agent runs.
    job.repos = job.quick
    (record,) = job.run(evaluate=True, retry=True)
    assert job.model is not None
    assert not job.model.requests
    assert (record["status"], record["resolved"]) == ("finished", True)
    assert job.result.counters()["rows_resolved"] == 1


@pytest.mark.parametrize("error", [EngineUnavailable, WorkspaceError])
def test_a_judge_without_a_place_loses_no_run(
    folder: Path,
    warm: Warm,
    repos: list[SweRepo],
    python: str,
    monkeypatch: pytest.MonkeyPatch,
    error: type[EngineUnavailable | WorkspaceError],
) -> None:
    async def judge(_: Judge, task: Task, patch: str | None) -> None:
        assert patch
        raise error(f"no place for {task.instance_id}")

    monkeypatch.setattr(Judge, "judge", judge)
    repo = repos[0]
    job = Job(folder, warm, [repo], python, {repo.folder.name: mending(repo)}, {"evaluate": True})
    (record,) = job.run()
    assert (record["status"], record["resolved"]) == ("finished", None)
    assert record["report"]["error_eval"] is True
    assert record["report"]["error"] == f"no place for {repo.instance_id}"
    assert job.result.counters()["rows_ok"] == 1
