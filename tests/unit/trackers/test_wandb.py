"""Weights & Biases through its real SDK, in a process of its own: offline, and against a server
that answers as its own does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.errors import AuthError, PipelineError
from spider_worker.trackers.build import build_tracker
from spider_worker.trackers.process import TrackerProcess
from tests.support.trackers import Tracked, on_policy_job, write_metrics
from tests.support.wandb_server import KEY, WandbRun, WandbServer

pytest.importorskip("wandb")

RUN = "spider-0123456789abcdef"


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


def secrets(server: WandbServer, key: str = KEY) -> dict[str, str]:
    return {"WANDB_API_KEY": key, "WANDB_BASE_URL": server.url}


def make(
    ctx: Tracked, resume: int | None = None, *, patience: float | None = None
) -> TrackerProcess:
    tracker = build_tracker(ctx, resume, allow_private=True)
    assert tracker is not None
    if patience is not None:
        tracker.spec = type(tracker.spec)(**{**vars(tracker.spec), "patience": patience})
    return tracker


def tracked(folder: Path, given: dict[str, str]) -> Tracked:
    return Tracked(folder, on_policy_job(wandb_project="sums", wandb_name="try 3"), given)


def log(tracker: TrackerProcess, steps: range) -> None:
    for step in steps:
        tracker.log(step, {"step": step, "kl": step / 10, "bad": float("nan")})


def earlier(server: WandbServer, last: int) -> WandbRun:
    """What an attempt left at the server that had come to step ``last``."""
    history = [{"_step": step, "kl": -1.0} for step in range(1, last + 1)]
    run = WandbRun(RUN, "sums", "try 3", {}, history, summary={"_step": last})
    server.runs["sums", RUN] = run
    return run


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def child_of(tracker: TrackerProcess) -> int:
    process = tracker._process
    assert process is not None
    return process.pid


# A run ---------------------------------------------------------------------------------


def test_a_run_is_checked_logged_and_finished(server: WandbServer, tmp_path: Path) -> None:
    ctx = tracked(tmp_path, secrets(server))
    tracker = make(ctx)
    tracker.check()
    assert not server.runs  # a check makes nothing
    tracker.start(write_metrics(tmp_path / "metrics.jsonl", ()))
    log(tracker, range(1, 6))
    assert tracker.finish("data") == {}
    run = server.run("sums", RUN)
    assert run.steps == [1, 2, 3, 4, 5]
    assert [line["kl"] for line in run.history] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert not [line for line in run.history if "bad" in line or "step" in line]
    assert (run.name, run.exit_code, run.summary["ended"]) == ("try 3", 0, "data")
    assert run.config["teacher"]["value"] == "org/teacher"
    assert ctx.codes == ["tracker.started"]
    assert f"/sums/runs/{RUN}" in ctx.events[0][2]
    # Neither code nor machine nor console, and the key nowhere.
    assert set(run.files) <= {"wandb-summary.json", "config.yaml"}
    for path in tmp_path.rglob("*"):
        assert path.name not in (".netrc", "_netrc")
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
    assert tracker.finish("data") == {}  # once is enough


def test_an_evaluation_that_comes_late_is_in_the_summary(
    server: WandbServer, tmp_path: Path
) -> None:
    tracker = make(tracked(tmp_path, secrets(server)))
    tracker.start(write_metrics(tmp_path / "metrics.jsonl", ()))
    log(tracker, range(1, 4))
    tracker.log(3, {"eval/kl": 0.25})
    tracker.finish("data")
    run = server.run("sums", RUN)
    assert run.steps == [1, 2, 3]
    assert (run.summary["kl"], run.summary["eval/kl"]) == (0.3, 0.25)


def test_a_failed_run_is_shown_as_one(server: WandbServer, tmp_path: Path) -> None:
    tracker = make(tracked(tmp_path, secrets(server)))
    tracker.start(write_metrics(tmp_path / "metrics.jsonl", ()))
    tracker.finish("failed")
    run = server.run("sums", RUN)
    assert (run.exit_code, run.summary["ended"]) == (1, "failed")


# Another attempt -----------------------------------------------------------------------


def test_an_attempt_goes_on_with_the_same_run_and_adds_what_is_missing(
    server: WandbServer, tmp_path: Path
) -> None:
    run = earlier(server, 3)  # steps 4 and 5 were still on their way when the worker died
    ctx = tracked(tmp_path, secrets(server))
    tracker = make(ctx, 5)
    tracker.start(write_metrics(tmp_path / "metrics.jsonl", range(1, 6)))
    log(tracker, range(6, 8))
    tracker.finish("data")
    assert run.steps == [1, 2, 3, 4, 5, 6, 7]
    assert [line["kl"] for line in run.history] == [-1, -1, -1, 0.4, 0.5, 0.6, 0.7]
    assert len(server.runs) == 1
    assert "RewindRun" not in server.asked
    assert ctx.codes == ["tracker.started"]


def test_an_evaluation_that_an_attempt_makes_up_for_is_in_the_summary(
    server: WandbServer, tmp_path: Path
) -> None:
    run = earlier(server, 5)
    tracker = make(tracked(tmp_path, secrets(server)), 5)
    tracker.start(write_metrics(tmp_path / "metrics.jsonl", range(1, 6)))
    tracker.log(5, {"eval/kl": 0.25}, late=True)
    log(tracker, range(6, 7))
    tracker.finish("data")
    assert run.steps == [1, 2, 3, 4, 5, 6]
    assert run.summary["eval/kl"] == 0.25


def test_steps_that_were_lost_are_cut_off(server: WandbServer, tmp_path: Path) -> None:
    run = earlier(server, 7)
    ctx = tracked(tmp_path, secrets(server))
    tracker = make(ctx, 4)
    tracker.start(write_metrics(tmp_path / "metrics.jsonl", range(1, 5)))
    log(tracker, range(5, 9))
    tracker.finish("data")
    assert run.steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["kl"] for line in run.history] == [-1, -1, -1, -1, 0.5, 0.6, 0.7, 0.8]
    assert [line["_step"] for line in run.archived] == [5, 6, 7]
    assert ctx.codes == ["tracker.started"]


def test_a_server_that_does_not_rewind_keeps_them_and_no_step_comes_twice(
    server: WandbServer, tmp_path: Path
) -> None:
    server.rewinds = False
    run = earlier(server, 7)
    ctx = tracked(tmp_path, secrets(server))
    tracker = make(ctx, 4)
    tracker.start(write_metrics(tmp_path / "metrics.jsonl", range(1, 5)))
    log(tracker, range(5, 10))
    tracker.finish("data")
    assert run.steps == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [line["kl"] for line in run.history][6:] == [-1, 0.8, 0.9]
    assert ctx.codes == ["tracker.started", "tracker.kept"]
    assert "steps 5 to 7" in ctx.events[1][2]


# Offline -------------------------------------------------------------------------------


def test_an_offline_run_is_one_file_with_all_of_it(server: WandbServer, tmp_path: Path) -> None:
    ctx = tracked(tmp_path, {"WANDB_MODE": "offline"})
    tracker = make(ctx, 3)  # of a second attempt: the first one's file is gone
    tracker.check()
    tracker.start(write_metrics(tmp_path / "metrics.jsonl", range(1, 4)))
    log(tracker, range(4, 6))
    kept = tracker.finish("token_budget")
    assert list(kept) == [f"wandb/run-{RUN}.wandb"]
    assert ctx.codes == ["tracker.started", "tracker.file"]
    assert f"wandb sync wandb/run-{RUN}.wandb" in ctx.events[1][2]
    assert not server.asked
    # What a user does with it.
    env = {**tracker.env, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
    command = [sys.executable, "-m", "wandb", "sync", str(*kept.values())]
    env.pop("WANDB_MODE")
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    run = server.run("sums", RUN)
    assert run.steps == [1, 2, 3, 4, 5]
    assert run.summary["ended"] == "token_budget"
    assert run.config["student"]["value"] == "org/student"


# What goes wrong -----------------------------------------------------------------------


def test_a_key_that_is_not_accepted_is_found_before_the_first_step(
    server: WandbServer, tmp_path: Path
) -> None:
    key = "f" * 40
    with pytest.raises(AuthError, match="does not accept WANDB_API_KEY") as caught:
        make(tracked(tmp_path, secrets(server, key))).check()
    assert key not in caught.value.message


def test_a_server_that_is_gone_fails_a_new_run_and_no_other(tmp_path: Path) -> None:
    with WandbServer() as server:
        gone = secrets(server)
    metrics = write_metrics(tmp_path / "metrics.jsonl", range(1, 4))
    for act in (lambda one: one.check(), lambda one: one.start(metrics)):
        with pytest.raises(PipelineError, match="cannot be reached"):
            act(make(tracked(tmp_path, gone)))
    ctx = tracked(tmp_path, gone)
    tracker = make(ctx, 3)
    tracker.start(metrics)
    log(tracker, range(4, 6))
    assert tracker.finish("data") == {}
    assert ctx.codes == ["tracker.lost", "tracker.incomplete"]
    assert all(level == "warning" for level, _, _ in ctx.events)


def test_a_network_that_goes_leaves_a_file_to_be_sent_later(
    server: WandbServer, tmp_path: Path
) -> None:
    ctx = tracked(tmp_path, secrets(server))
    tracker = make(ctx, patience=3.0)
    tracker.start(write_metrics(tmp_path / "metrics.jsonl", ()))
    server.down = True
    log(tracker, range(1, 4))
    kept = tracker.finish("data")
    assert list(kept) == [f"wandb/run-{RUN}.wandb"]
    assert ctx.codes == ["tracker.started", "tracker.incomplete", "tracker.file"]
    assert "did not take everything" in ctx.events[1][2]


def test_a_process_that_dies_costs_the_run_its_points_alone(tmp_path: Path) -> None:
    ctx = tracked(tmp_path, {"WANDB_MODE": "offline"})
    tracker = make(ctx)
    tracker.start(write_metrics(tmp_path / "metrics.jsonl", ()))
    log(tracker, range(1, 3))
    os.kill(child_of(tracker), signal.SIGKILL)
    wait_for(lambda: "tracker.lost" in ctx.codes)
    log(tracker, range(3, 6))
    assert tracker.finish("data") == {}
    assert ctx.codes == ["tracker.started", "tracker.lost", "tracker.incomplete"]


def test_a_run_that_another_attempt_has_is_left_alone(server: WandbServer, tmp_path: Path) -> None:
    ctx = tracked(tmp_path, secrets(server))
    tracker = make(ctx)
    tracker.start(write_metrics(tmp_path / "metrics.jsonl", ()))
    child = child_of(tracker)
    log(tracker, range(1, 3))
    assert tracker.finish(None) == {}
    assert not Path(f"/proc/{child}").exists()
    assert server.run("sums", RUN).exit_code is None
    assert ctx.codes == ["tracker.started"]


def test_a_process_that_hangs_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spider_worker.trackers.process._MARGIN", 0.5)
    ctx = tracked(tmp_path, {"WANDB_MODE": "offline"})
    tracker = make(ctx, patience=0.5)
    tracker.start(write_metrics(tmp_path / "metrics.jsonl", ()))
    child = child_of(tracker)
    os.kill(child, signal.SIGSTOP)
    for step in range(1, 200):  # more than a pipe holds
        tracker.log(step, {f"figure-{number}": 1.0 for number in range(200)})
    assert tracker.finish("data") == {}
    assert ctx.codes == ["tracker.started", "tracker.lost", "tracker.incomplete"]
    assert "did not answer within" in ctx.events[1][2]
    assert not Path(f"/proc/{child}").exists()


WORKER = """
import json, sys, time
from pathlib import Path
from tests.unit.trackers.test_wandb import log, make, tracked
folder, secrets = Path(sys.argv[1]), json.loads(sys.argv[2])
tracker = make(tracked(folder, secrets))
tracker.start(Path(sys.argv[3]))
log(tracker, range(1, 4))
print(tracker._process.pid, flush=True)
time.sleep(600)
"""


def test_a_worker_that_is_killed_takes_its_tracker_along(
    server: WandbServer, tmp_path: Path
) -> None:
    """Or it would write into the run that another attempt goes on with."""
    metrics = write_metrics(tmp_path / "metrics.jsonl", ())
    arguments = [str(tmp_path), json.dumps(secrets(server)), str(metrics)]
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments], stdout=subprocess.PIPE, text=True
    ) as worker:
        try:
            assert worker.stdout is not None
            child = int(worker.stdout.readline())
            wait_for(lambda: server.run("sums", RUN).steps == [1, 2, 3])
        finally:
            worker.kill()
    wait_for(lambda: not Path(f"/proc/{child}").exists())
    assert server.run("sums", RUN).exit_code is None  # nothing says that it ended well
