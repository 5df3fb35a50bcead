"""Celery workers as Celery's own tools start and see them."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spider_api.embedded.ports import free_port
from spider_sdk.jobs import QUEUES
from spider_worker.fleet.broker import make_app
from tests.support.fleet_harness import ROOT, Harness, eventually, start


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    yield from start(tmp_path)


@pytest.fixture
def flower(harness: Harness) -> Iterator[str]:
    """The address of a flower on the harness's fleet."""
    port = free_port()
    command = [sys.executable, "-m", "celery", "-A", "spider_worker", "flower"]
    with (harness.folder / "flower.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--address=127.0.0.1", f"--port={port}"],
            env={**harness.env, "FLOWER_UNAUTHENTICATED_API": "true"},
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)


def test_a_typo_in_a_queue_stops_the_worker_with_a_word(harness: Harness) -> None:
    worker = harness.worker("-Q", "ofline-gen")
    assert worker.process.wait(30) != 0
    assert "ofline-gen" in worker.log.read_text()


def test_celery_inspect_sees_the_alias_as_its_three_queues(harness: Harness) -> None:
    harness.worker("-Q", "gpu")
    inspect = make_app(harness.fleet.settings).control.inspect(timeout=5)
    queues = eventually(inspect.active_queues, "an answer to inspect")
    assert {q["name"] for qs in queues.values() for q in qs} == set(QUEUES)


def test_flower_sees_every_worker_and_its_queues(harness: Harness, flower: str) -> None:
    harness.worker("-Q", "gpu")
    harness.worker("-Q", "offline-gen")

    def workers() -> dict[str, Any] | None:
        try:
            with urllib.request.urlopen(f"{flower}/api/workers?refresh=1", timeout=10) as answer:
                found: dict[str, Any] = json.load(answer)
        except OSError:
            return None  # it starts
        asked = [worker for worker in found.values() if worker.get("active_queues")]
        return found if len(asked) == 2 else None

    seen = eventually(workers, f"flower's word on two workers: {harness.folder / 'flower.log'}")
    queues = {
        name.partition("@")[0]: {queue["name"] for queue in worker["active_queues"]}
        for name, worker in seen.items()
    }
    assert queues == {"w0": set(QUEUES), "w1": {"offline-gen"}}
