"""What a terminal shows while agents are at work, and Ctrl-C there."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from spider_worker.trajectories.output_file import read
from tests.support.scripted_server import event, event_stream, frame, job_status
from tests.support.swe_jobs import JOB, TREE, Jobs, attempt

ROOT = Path(__file__).parents[3]


def test_instances_at_work_stand_below_the_progress(
    jobs: Jobs, config: Callable[..., str], plain: Path
) -> None:
    jobs.run("a", attempt("a"))
    log = [
        event(0, "job.running"),
        event(1, "instance.started", "a", instance="a", n=0),
        event(2, "instance.started", "b", instance="b", n=0),
        event(3, "instance.ended", "a: finished, 3 turns, $0.25", instance="a", n=0),
        event(4, "progress", metrics={"rows_done": 1, "rows_total": 2, "cost_usd": 0.25}),
    ]
    jobs.server.on("GET", "/v1/jobs/j1", job_status("running", log, job=JOB))
    jobs.server.on("GET", "/v1/jobs/j1/events", event_stream(map(frame, log), then="hold"))
    keep, give = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "spider_scaffold.cli", "openhands", "--config", config()]
    with subprocess.Popen(
        command, cwd=plain, env=env, stdin=give, stdout=give, stderr=give, start_new_session=True
    ) as process:
        os.close(give)
        shown = b""
        while b"  b \xc2\xb7 0m" not in shown or b"1/2 instances" not in shown:
            assert select.select([keep], [], [], 60)[0], shown
            chunk = os.read(keep, 65536)
            assert chunk, shown
            shown += chunk
        process.send_signal(signal.SIGINT)
        while chunk := _read(keep):
            shown += chunk
        assert process.wait() == 130
    os.close(keep)
    text = " ".join(shown.decode().split())
    assert "instance.ended a: finished, 3 turns, $0.25" in text
    assert "detached; job j1 goes on at http://127.0.0.1" in text
    assert [one.instance_id for one in read(plain / TREE / "output.jsonl")] == ["a"]


def _read(handle: int) -> bytes:
    try:
        return os.read(handle, 65536)
    except OSError:  # how Linux says that the other side has closed
        return b""
