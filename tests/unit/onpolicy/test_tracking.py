"""What a run's tracker is told, over all the attempts that the run takes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.errors import EngineUnavailable, PipelineError
from spider_worker.pipelines.base import JobContext
from spider_worker.pipelines.onpolicy_train.evaluation import Evaluation
from tests.support.distil import Models, Run
from tests.unit.onpolicy.test_run import LONG, after


class Tracker:
    """Remembers what it is told. ``resume`` is the step that it was asked for with."""

    def __init__(self, ctx: JobContext, resume: int | None) -> None:
        self.resume = resume
        self.checked = False
        self.begun: list[int] | None = None  # steps that the metrics had when it was started
        self.logged: list[tuple[int, bool]] = []  # steps, and whether they came late
        self.points: list[dict[str, float]] = []
        self.ended: list[str | None] = []
        self._file = ctx.scratch / "tracked.json"

    def check(self) -> None:
        self.checked = True

    def start(self, metrics: Path) -> None:
        self.begun = [json.loads(line)["step"] for line in metrics.read_bytes().splitlines()]

    def log(self, step: int, metrics: Mapping[str, float], *, late: bool = False) -> None:
        assert self.begun is not None
        assert not self.ended
        self.logged.append((step, late))
        self.points.append(dict(metrics))

    def finish(self, status: str | None) -> Mapping[str, Path]:
        self.ended.append(status)
        if len(self.ended) > 1 or status is None:
            return {}
        self._file.write_text(json.dumps(self.logged), encoding="utf-8")
        return {"tracked.json": self._file}


def track(run: Run) -> list[Tracker]:
    """The trackers that the run will make."""
    made: list[Tracker] = []

    def build(ctx: JobContext, resume: int | None) -> Tracker:
        made.append(Tracker(ctx, resume))
        return made[-1]

    run._changes["tracker"] = lambda _: build
    return made


def figures(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: one[name] for name in one if name != "id"} for one in records]


def test_each_attempt_tells_its_tracker_of_the_steps_that_it_makes(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, evaluate = itertools.count(1), Evaluation.run

    async def fail(self: Evaluation, sampler: Any) -> Any:
        if next(calls) == 2:
            raise EngineUnavailable("the sampler is gone")
        return await evaluate(self, sampler)

    monkeypatch.setattr(Evaluation, "run", fail)
    # One is held out; 5 batches of 4, and a last one that cannot be sampled.
    rows = [{"question": LONG if n == 21 else "count", "kind": "odd"} for n in range(22)]
    run = Run(tmp_path, models, rows=rows, options={"eval_every": 2, "eval_examples": 1})
    made = track(run)
    with pytest.raises(PipelineError, match="the sampler is gone"):
        run.go()  # step 2, but not its evaluation
    # That, and step 3; then it is taken back.
    run._changes["trainer"] = after(1, asyncio.CancelledError(), "optim_step")
    with pytest.raises(asyncio.CancelledError):
        run.go()
    del run._changes["trainer"]
    run.go()
    asked, first, second, third = made
    assert [tracker.resume for tracker in made] == [None, None, 2, 2]
    assert (asked.checked, asked.begun, asked.ended) == (True, None, [])
    assert (first.begun, first.logged) == ([], [(0, False), (1, False), (2, False)])
    assert (second.begun, second.logged) == ([0, 1, 2], [(2, True), (3, False)])
    assert third.begun == [0, 1, 2, 2]
    assert third.logged == [(3, False), (4, False), (5, False), (5, True)]
    assert [tracker.ended[0] for tracker in made[1:]] == ["failed", None, "data"]
    records = run.metrics()
    assert [record["step"] for record in records] == [0, 1, 2, 2, 3, 4, 5, 5]
    # All that counts and is on record was told once, with the record's own numbers.
    told = [*first.points, second.points[0], *third.points]
    assert told == figures(records)
    assert {"eval/kl", "seconds/eval"} <= third.points[-1].keys()
    assert json.loads(run.artifact("tracked.json").read_text()) == [list(p) for p in third.logged]


def test_an_attempt_that_is_taken_back_leaves_its_tracker_to_the_next(
    tmp_path: Path, models: Models
) -> None:
    run = Run(tmp_path, models)
    made = track(run)
    run._changes["trainer"] = after(1, asyncio.CancelledError(), "optim_step")
    with pytest.raises(asyncio.CancelledError):
        run.go()
    assert made[-1].ended == [None]


def test_a_run_that_fails_leaves_what_its_tracker_kept(tmp_path: Path, models: Models) -> None:
    gone = EngineUnavailable("the service is gone")
    for method, calls, steps in (
        ("sampler", 0, []),
        ("forward_backward", 1, [0, 1]),
        ("save_adapter", 1, [0, 1, 2]),  # after the tracker's end
    ):
        run = Run(tmp_path / method, models, rows=10)
        track(run)
        run._changes["trainer"] = after(calls, gone, method)
        with pytest.raises((EngineUnavailable, PipelineError), match="is gone"):
            run.go()
        assert json.loads(run.artifact("tracked.json").read_text()) == [[n, False] for n in steps]


def test_trackios_database_of_a_run_that_was_taken_up_has_each_step_once(
    tmp_path: Path, models: Models
) -> None:
    pytest.importorskip("trackio")
    options = {"tracker": "trackio", "wandb_project": "sums", "wandb_name": "first"}
    run = Run(tmp_path, models, rows=10, options=options)
    gone = EngineUnavailable("the service is gone")
    run._changes["trainer"] = after(1, gone, "forward_backward")
    with pytest.raises(PipelineError, match="is gone"):
        run.go()
    assert points(run.artifact("trackio/sums.db")) == figures(run.metrics())
    assert [one["step"] for one in run.metrics()] == [0, 1]
    del run._changes["trainer"]
    run.go()
    assert points(run.artifact("trackio/sums.db")) == figures(run.metrics())
    assert [one["step"] for one in run.metrics()] == [0, 1, 2]


def points(database: Path) -> list[dict[str, Any]]:
    """What the one run there was told, in that order."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id")
        found = rows.fetchall()
    assert {name for name, _, _ in found} == {"first-local"}
    return [{"step": step, **json.loads(metrics)} for _, step, metrics in found]
