"""Accelerators are locked per device, and a lock lives as long as anybody who inherited it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spider_sdk.errors import EngineUnavailable
from spider_worker.supervisor import devices
from spider_worker.supervisor.devices import DevicePool


def test_devices_come_from_the_setting_then_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert DevicePool.of_host("0, 1,2", tmp_path).ids == ("0", "1", "2")
    assert DevicePool.of_host(None, tmp_path).ids == ("4", "5")
    assert DevicePool.of_host("None", tmp_path).ids == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert DevicePool.of_host(None, tmp_path).ids == ()


def test_without_nvidia_smi_they_are_those_of_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(devices, "NODES", tmp_path)
    assert DevicePool.of_host(None, tmp_path).ids == ()
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    assert DevicePool.of_host(None, tmp_path).ids == ("0", "1")


def test_a_runner_gets_as_many_as_it_needs_and_nobody_else_gets_those(tmp_path: Path) -> None:
    pool = DevicePool(("0", "1", "2", "3"), tmp_path)
    first = pool.take(3)
    assert first is not None
    assert first.ids == ("0", "1", "2")
    assert pool.take(2) is None, "one is free, two are wanted"
    second = pool.take(1)
    assert second is not None
    assert second.ids == ("3",)
    first.release()
    again = pool.take(2)
    assert again is not None
    assert again.ids == ("0", "1")
    for taken in (again, second):
        taken.release()


def test_two_workers_of_one_host_share_the_locks(tmp_path: Path) -> None:
    mine, theirs = DevicePool(("0",), tmp_path), DevicePool(("0",), tmp_path)
    held = mine.take(1)
    assert held is not None
    assert theirs.take(1) is None
    held.release()
    free = theirs.take(1)
    assert free is not None
    free.release()


def test_more_than_the_worker_has_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match=r"needs 4 .* has 2.*tensor_parallel_size"):
        DevicePool(("0", "1"), tmp_path).take(4)


def test_a_worker_without_devices_leaves_the_question_to_the_engine(tmp_path: Path) -> None:
    devices = DevicePool((), tmp_path).take(4)
    assert devices is not None
    assert devices.ids == ()


def test_a_survivor_keeps_its_device(tmp_path: Path) -> None:
    pool = DevicePool(("0",), tmp_path)
    held = pool.take(1)
    assert held is not None
    survivor = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        pass_fds=held.locks,
    )
    held.release()
    assert pool.take(1) is None, "the child still has the device"
    survivor.communicate()
    free = pool.take(1)
    assert free is not None
    free.release()
