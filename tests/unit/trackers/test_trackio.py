"""trackio for real: into a database, and to a server of its own."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spider_sdk.errors import AuthError, FatalJobError, PipelineError
from spider_worker.trackers.build import build_tracker
from spider_worker.trackers.process import TrackerProcess
from tests.support.trackers import Tracked, on_policy_job, write_metrics

pytest.importorskip("trackio")

SERVER = """
import socket
import uvicorn
from trackio.server import build_starlette_app_only
app, token = build_starlette_app_only()
listener = socket.create_server(("127.0.0.1", 0))
print(f"http://127.0.0.1:{listener.getsockname()[1]}/?write_token={token}", flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])
"""


def make(ctx: Tracked, resume: int | None = None) -> TrackerProcess:
    tracker = build_tracker(ctx, resume, allow_private=True)
    assert tracker is not None
    return tracker


def tracked(folder: Path, given: dict[str, str], project: str = "my sums") -> Tracked:
    job = on_policy_job(wandb_project=project, tracker="trackio", wandb_name="try 3")
    return Tracked(folder, job, given)


def logged(database: Path) -> list[tuple[int, float]]:
    """The steps of the one run, with their KL."""
    with sqlite3.connect(database) as connection:
        names = {row[0] for row in connection.execute("SELECT DISTINCT run_name FROM metrics")}
        rows = connection.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
    connection.close()
    assert names == {"try 3-0123456789abcdef"}
    return [(step, json.loads(metrics)["kl"]) for step, metrics in rows]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Its address with the token, and the folder of its databases."""
    folder = tmp_path / "server"
    env = {**os.environ, "TRACKIO_DIR": str(folder), "HOME": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], env=env, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        url = next(line.strip() for line in lines if line.startswith("http"))
        yield url, folder
        process.kill()


def test_a_run_is_a_database_with_all_of_it(tmp_path: Path) -> None:
    ctx = tracked(tmp_path, {})
    tracker = make(ctx, 3)  # a second attempt, which has nothing of the first one's
    tracker.check()
    tracker.start(write_metrics(tmp_path / "metrics.jsonl", range(1, 4)))
    for step in range(4, 6):
        tracker.log(step, {"step": step, "kl": step / 10})
    kept = tracker.finish("data")
    assert list(kept) == ["trackio/mysums.db"]
    assert logged(*kept.values()) == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (5, 0.5)]
    assert ctx.codes == ["tracker.started", "tracker.file"]
    assert "trackio show --project 'my sums'" in ctx.events[1][2]


def test_a_run_without_a_point_is_no_file(tmp_path: Path) -> None:
    ctx = tracked(tmp_path, {})
    tracker = make(ctx)
    tracker.start(write_metrics(tmp_path / "metrics.jsonl", ()))
    assert tracker.finish("cancelled") == {}
    assert ctx.codes == ["tracker.started"]


def test_a_project_that_trackio_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(FatalJobError, match=r"wandb_project.*reserved"):
        make(tracked(tmp_path, {}, "sums_configs")).check()


def test_a_server_gets_each_step_once(server: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = server
    given = {"TRACKIO_SERVER_URL": url}
    metrics = tmp_path / "metrics.jsonl"
    first = make(tracked(tmp_path / "1", given))
    first.check()
    first.start(write_metrics(metrics, ()))
    for step in range(1, 5):
        first.log(step, {"kl": step / 10})
    assert first.finish("failed") == {}
    # Steps 3 and 4 were after the last state; 5 to 6 are new.
    ctx = tracked(tmp_path / "2", given)
    second = make(ctx, 2)
    second.start(write_metrics(metrics, (1, 2)))
    for step in range(3, 7):
        second.log(step, {"kl": step / 100})
    assert second.finish("data") == {}
    expected = [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (5, 0.05), (6, 0.06)]
    assert logged(folder / "mysums.db") == expected
    assert ctx.codes == ["tracker.started", "tracker.kept"]
    token = url.partition("write_token=")[2]
    assert token
    assert token not in str(ctx.events)


def test_a_token_that_is_not_accepted(server: tuple[str, Path], tmp_path: Path) -> None:
    url = server[0].partition("?")[0]
    given = {"TRACKIO_SERVER_URL": url, "TRACKIO_WRITE_TOKEN": "wrong-token"}
    with pytest.raises(AuthError, match="TRACKIO_WRITE_TOKEN"):
        make(tracked(tmp_path, given)).check()


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    given = {"TRACKIO_SERVER_URL": "http://127.0.0.1:9", "TRACKIO_WRITE_TOKEN": "token"}
    with pytest.raises(PipelineError, match="cannot be reached"):
        make(tracked(tmp_path, given)).check()
