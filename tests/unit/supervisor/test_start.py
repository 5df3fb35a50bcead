"""What a worker is started with, before it has a job."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from spider_worker.fleet.broker import check_queues
from spider_worker.supervisor.supervisor import absolute_roots


def test_a_queue_that_is_none_is_told_from_those_that_there_are() -> None:
    assert check_queues(["gpu"]) == ["offline-gen", "onpolicy-train", "swe-agent"]
    assert check_queues("offline-gen") == ["offline-gen"]
    with pytest.raises(
        click.UsageError, match=r"no queue 'ofline-gen': offline-gen, .*gpu for all"
    ):
        check_queues(["gpu", "ofline-gen"])


def test_data_roots_mean_the_worker_s_folder_and_not_the_runner_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    wanted = f"{tmp_path}/models:/home/ada/more:/data"
    assert absolute_roots("models:~/more::/data") == wanted
