"""kill -9 at any moment: no row lost, none twice, no request repeated but those in flight."""

from __future__ import annotations

import collections
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spider_worker.testing import LocalStore
from tests.unit.offline_gen.crashing_job import CAPACITY, ROWS

_ROOT = Path(__file__).resolve().parents[3]
_KILLS = 5


def start(folder: Path, kind: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.unit.offline_gen.crashing_job", str(folder), kind]
    return subprocess.Popen(command, cwd=_ROOT, env={**os.environ, "PYTHONHASHSEED": "0"})


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.parametrize("kind", ["plain", "processors", "stream"])
def test_a_killed_job_goes_on(tmp_path: Path, kind: str) -> None:
    chance = random.Random(kind)
    asked = tmp_path / "asked"
    for kill in range(_KILLS):
        # About a seventh of the job in each life, so that kills fall on all of its stages.
        wanted = (kill + chance.random()) * ROWS / (_KILLS + 2) * 5
        child = start(tmp_path, kind)
        deadline = time.monotonic() + 60
        while size(asked) < wanted and time.monotonic() < deadline:
            assert child.poll() is None, "ended before it was killed"
            time.sleep(0.001)
        child.kill()
        child.wait()
    child = start(tmp_path, kind)
    assert child.wait(timeout=60) == 0

    requests = collections.Counter(asked.read_text().split())
    records = []
    store = LocalStore(tmp_path / "job")
    for shard in store.shards():
        lines = shard.path.read_bytes().splitlines()
        records += [int(line.split(b'"index":')[1].split(b",")[0]) for line in lines]
    silent = {"7"} if kind == "processors" else set()
    lost = {"3", "7"} if kind == "processors" else set()
    assert records == [index for index in range(ROWS) if str(index)[-1] not in lost]
    assert set(requests) == {f"q{i}" for i in range(ROWS) if str(i)[-1] not in silent}
    repeated = sum(requests.values()) - len(requests)
    assert repeated <= _KILLS * CAPACITY
    assert max(requests.values()) <= 1 + _KILLS
    assert sum(shard.counters["rows_done"] for shard in store.shards()) == ROWS
