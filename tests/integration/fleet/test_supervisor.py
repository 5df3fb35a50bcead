"""The supervisor in this process, over a real Redis, with runners that misbehave."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.errors import FleetError
from spider_sdk.jobs import JobStatus, Queue
from spider_worker.fleet import Claim, Fleet
from spider_worker.settings import WorkerSettings
from spider_worker.supervisor import Supervisor
from spider_worker.supervisor.devices import DevicePool, Devices
from spider_worker.supervisor.handle import RunnerGone, RunnerHandle
from tests.support.fleet_harness import alive, eventually
from tests.support.jobs import openai_job, upload_rows


def settings(folder: Path, **changes: Any) -> WorkerSettings:
    return WorkerSettings(state=folder / "state", env_cache=folder / "envs", **changes)


def script(folder: Path, text: str) -> str:
    """An interpreter for ``python_offline_gen`` that does something else."""
    path = folder / "interpreter"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def submit(fleet: Fleet, **changes: Any) -> str:
    document = {**openai_job("http://127.0.0.1:9/v1", upload_rows(fleet, 3)), **changes}
    return fleet.jobs.submit("me", document, {}, queue=Queue.OFFLINE_GEN).job_id


def codes(fleet: Fleet, job: str) -> list[str]:
    return [event.code for event in fleet.events.read(job).events]


def test_a_job_that_waits_for_an_accelerator_fills_no_history(fleet: Fleet, tmp_path: Path) -> None:
    supervisor = Supervisor(fleet, settings(tmp_path, devices="0"))
    taken = DevicePool(("0",), tmp_path / "state" / "devices").take(1)
    assert taken is not None
    model = {"provider": "transformers", "name": "m", "parameters": {"device": "cuda"}}
    job = submit(fleet, model=model)
    for _ in range(20):
        supervisor.work(job)
    assert codes(fleet, job) == ["job.queued"]
    due = fleet.redis.zscore("spider:active", job)
    assert due is not None
    seconds, _ = fleet.redis.time()
    assert due <= (seconds + 6) * 1000, "looked at again soon"
    taken.release()


def test_a_job_that_no_worker_can_read_fails_with_its_reason(fleet: Fleet, tmp_path: Path) -> None:
    job = submit(fleet, model={"name": "m", "provider": "no-such"})
    Supervisor(fleet, settings(tmp_path)).work(job)
    record = fleet.jobs.get(job)
    assert (record.status, record.reason) == (JobStatus.FAILED, "refused")
    assert "no-such" in (record.error or "")


def test_secrets_that_do_not_open_are_failed_attempts(fleet: Fleet, tmp_path: Path) -> None:
    """Not a release: that would be repeated at once, for ever, and say nothing."""
    document = openai_job("http://127.0.0.1:9/v1", upload_rows(fleet, 3))
    job = fleet.jobs.submit("me", document, {"K": "value"}, queue=Queue.OFFLINE_GEN).job_id
    sealed = bytearray(fleet.redis.get(f"spider:secrets:{job}"))
    sealed[-1] ^= 1
    fleet.redis.set(f"spider:secrets:{job}", bytes(sealed))
    supervisor = Supervisor(fleet, settings(tmp_path))

    def ended() -> bool:
        with contextlib.suppress(FleetError):
            supervisor.work(job)
        return fleet.jobs.get(job).status.is_terminal

    eventually(ended, "the end of its attempts")
    record = fleet.jobs.get(job)
    assert record.reason == "attempts_exhausted"
    assert "SPIDER_SECRET_KEY" in (record.error or "")


def test_a_lane_that_breaks_leaves_neither_runner_nor_claim(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    python = script(tmp_path, f"echo $$ > {pid}\nexec sleep 600")
    supervisor = Supervisor(fleet, settings(tmp_path, python_offline_gen=python))

    def broken(self: RunnerHandle, timeout: float) -> None:
        eventually(lambda: pid.exists() and pid.read_text().strip(), "the runner's start")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunnerHandle, "receive", broken)
    job = submit(fleet)
    with pytest.raises(OSError, match="No space"):
        supervisor.work(job)
    assert not alive(int(pid.read_text()))
    assert fleet.redis.zcard("spider:leases") == 0
    assert "No space left" in str(fleet.events.read(job).events)
    assert fleet.redis.hlen(f"spider:job:{job}:holders") == 0


FOUR = {"provider": "vllm", "name": "m", "parameters": {"tensor_parallel_size": 4}}


def test_a_runner_sees_as_many_devices_as_its_model_takes_and_no_key_of_the_fleet(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spider_worker.engines.vllm_options.is_cpu_build", lambda: False)
    monkeypatch.setenv("SPIDER_SECRET_KEY", "of the fleet")
    seen = tmp_path / "seen"
    python = script(tmp_path, f"env > {seen}")
    worker = settings(tmp_path, devices="2,3,5,7,9", python_offline_gen=python)
    Supervisor(fleet, worker).work(submit(fleet, model=FOUR))
    lines = seen.read_text().splitlines()
    assert "CUDA_VISIBLE_DEVICES=2,3,5,7" in lines
    assert not [line for line in lines if line.startswith("SPIDER_SECRET_KEY")]


@pytest.mark.parametrize("devices", ["none", "0"])
def test_a_runner_that_takes_no_device_sees_none(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: str
) -> None:
    """Whatever the machine has: nobody locked one for it."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = tmp_path / "seen"
    python = script(tmp_path, f"env > {seen}")
    asked = {"device": "cpu" if devices == "0" else "auto"}
    model = {"provider": "transformers", "name": "m", "parameters": asked}
    worker = settings(tmp_path, devices=devices, python_offline_gen=python)
    Supervisor(fleet, worker).work(submit(fleet, model=model))
    assert "CUDA_VISIBLE_DEVICES=" in seen.read_text().splitlines()


def test_a_model_of_four_devices_is_refused_where_there_are_two(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spider_worker.engines.vllm_options.is_cpu_build", lambda: False)
    job = submit(fleet, model=FOUR)
    Supervisor(fleet, settings(tmp_path, devices="0,1")).work(job)
    record = fleet.jobs.get(job)
    assert (record.status, record.reason) == (JobStatus.FAILED, "engine_unavailable")
    assert "tensor_parallel_size" in (record.error or "")


def pipes() -> int:
    """How many ends of pipes this process holds."""
    held = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            held += os.readlink(entry).startswith("pipe:")
    return held


def test_an_interpreter_that_is_not_there_is_named_and_leaks_nothing(
    fleet: Fleet, tmp_path: Path
) -> None:
    supervisor = Supervisor(fleet, settings(tmp_path, python_offline_gen="/no/such/python"))
    supervisor.work(submit(fleet))
    before = pipes()
    for _ in range(5):
        job = submit(fleet)
        supervisor.work(job)
    assert pipes() <= before
    assert "SPIDER_PYTHON_OFFLINE_GEN" in (fleet.jobs.get(job).error or "")


@pytest.fixture
def claim(fleet: Fleet) -> Claim:
    found = fleet.units.claim(submit(fleet), "h", ("plan",))
    assert isinstance(found, Claim)
    return found


@pytest.fixture
def handles(fleet: Fleet, tmp_path: Path) -> Iterator[Any]:
    made: list[RunnerHandle] = []

    def make(code: str) -> RunnerHandle:
        command = [sys.executable, "-c", code]
        made.append(RunnerHandle(fleet, "h", command, os.environ, Devices(), tmp_path / "run"))
        return made[-1]

    yield make
    for handle in made:
        handle.kill()
    for thread in threading.enumerate():  # they use the fleet, which is closed next
        if thread.name.startswith("h-"):
            thread.join(20)


def gone(handle: RunnerHandle) -> bool:
    try:
        handle.receive(0.01)
    except RunnerGone:
        return True
    return False


def test_a_large_job_does_not_hold_up_the_leases(fleet: Fleet, claim: Claim, handles: Any) -> None:
    """A runner that imports for long reads its pipe late; the pipe holds 64 KiB."""
    handle = handles("import time; time.sleep(600)")
    handle.begin(claim.job_id, {})
    giving = threading.Thread(
        target=handle.give, args=(claim,), kwargs={"job": "x" * 1_000_000}, daemon=True
    )
    giving.start()
    member = f"{claim.job_id} {claim.unit}"
    seen = {fleet.redis.zscore("spider:leases", member)}

    def renewed() -> bool:
        seen.add(fleet.redis.zscore("spider:leases", member))
        return len(seen) > 4

    eventually(renewed, "four renewals", 20)
    assert giving.is_alive()
    handle.kill()
    giving.join(10)


def test_a_log_that_cannot_be_written_does_not_stop_the_runner(
    fleet: Fleet, claim: Claim, handles: Any
) -> None:
    fleet.artifacts.log_file(claim.job_id, "h").symlink_to("/dev/full")
    # More than a pipe holds: without a reader it would wait for ever.
    handle = handles("import sys; sys.stdin.read()\nfor i in range(9999): print('x' * 100)")
    handle.begin(claim.job_id, {})
    eventually(lambda: gone(handle), "the runner's end", 30)


def test_lines_that_come_late_are_redacted_too(fleet: Fleet, claim: Claim, handles: Any) -> None:
    handle = handles("import time; time.sleep(600)")
    handle.begin("first", {"TOKEN": "canary-one"})
    handle.begin(claim.job_id, {"TOKEN": "canary-two"})
    assert handle.redact("canary-one canary-two") == "[TOKEN] [TOKEN]"


def test_a_cancel_of_the_job_before_does_not_reach_the_next(
    fleet: Fleet, claim: Claim, handles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look at the flag is answered after the runner has begun on another job."""
    handle = handles("import time; time.sleep(600)")
    told: list[str] = []
    monkeypatch.setattr(handle, "tell", lambda op, **fields: told.append(op))
    looked, answer = threading.Event(), threading.Event()

    def slow(job_id: str) -> bool:
        if job_id != claim.job_id:
            return False
        looked.set()
        assert answer.wait(20)
        return True

    monkeypatch.setattr(fleet.jobs, "stop_requested", slow)
    handle.begin(claim.job_id, {})
    handle.give(claim)
    assert looked.wait(20)
    handle.begin("another", {})
    answer.set()
    beats = len(told)
    eventually(lambda: told[beats:].count("beat") > 2, "the thread that looks goes on")
    assert "cancel" not in told


def test_the_watchdog_ends_a_runner_whose_output_nobody_reads() -> None:
    """A stopped supervisor reads no logs; its runner must still end before its lease does."""
    control, keep = os.pipe()
    code = (
        "import logging, sys\n"
        "from spider_worker.runner.watchdog import Watchdog\n"
        "logging.basicConfig(stream=sys.stdout, level=logging.INFO)\n"
        f"Watchdog({control}, 2).start(lambda message: None)\n"
        "while True: logging.info('x' * 1000)\n"
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        pass_fds=(control,),
        start_new_session=True,
    )
    os.close(control)
    try:
        assert runner.wait(30) == -9
    finally:
        runner.kill()
        os.close(keep)
        assert runner.stdout is not None
        runner.stdout.close()


def test_a_claim_outlives_the_end_of_an_idle_runner(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runner that is sent away may take longer over it than a lease."""
    supervisor = Supervisor(fleet, settings(tmp_path))
    job = submit(fleet)
    claim = fleet.units.claim(job, "holder", ("plan",))
    assert isinstance(claim, Claim)

    def expiry() -> float:
        ((_, until),) = fleet.redis.zrange("spider:leases", 0, -1, withscores=True)
        return float(until)

    first = expiry()

    def slowly(self: Supervisor, idle_since: float) -> None:
        eventually(lambda: int(fleet.redis.time()[0]) * 1000 > first, "the end of the first lease")

    monkeypatch.setattr(Supervisor, "_evict", slowly)
    supervisor._evict_beside(claim)
    fleet.reaper.sweep()
    assert expiry() > first
    assert not fleet.units.beat(job, [claim]).lost


def test_a_runner_that_is_gone_before_its_job_begins_leaves_no_log_open(
    fleet: Fleet, tmp_path: Path
) -> None:
    supervisor = Supervisor(
        fleet, settings(tmp_path, python_offline_gen=script(tmp_path, "exit 0"))
    )
    handle = supervisor._start(Queue.OFFLINE_GEN, "holder", Devices())
    eventually(lambda: handle._pumped, "the end of its output")
    handle.begin(submit(fleet), {})
    assert handle._log is None
