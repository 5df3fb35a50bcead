"""A worker's supervisor: one lane a hint, warm runners kept for the next job."""

from __future__ import annotations

__all__ = ["Supervisor", "absolute_roots"]

import dataclasses
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from errno import ENOEXEC
from pathlib import Path

from spider_sdk.config import parse_job
from spider_sdk.errors import (
    ConfigError,
    EngineUnavailable,
    FleetUnavailable,
    JobNotFound,
    LeaseLost,
    NotSupported,
    SpiderError,
)
from spider_sdk.jobs import Queue
from spider_worker.control import Message, redact
from spider_worker.fleet import Claim, Fleet, JobRecord, NoUnit
from spider_worker.pipelines.base import UnitKind
from spider_worker.settings import WorkerSettings
from spider_worker.supervisor.devices import DevicePool, Devices
from spider_worker.supervisor.handle import RunnerGone, RunnerHandle
from spider_worker.supervisor.needs import devices_needed, runner_key

logger = logging.getLogger(__name__)

ANY_KIND = (UnitKind.PLAN, UnitKind.WORK, UnitKind.PUBLISH, UnitKind.FINALISE)
#: Variables of the worker that a runner has no business with.
WITHHELD = frozenset({"SPIDER_SECRET_KEY", "SPIDER_SECRET_KEY_FILE", "SPIDER_API_KEY"})
#: Errors of a job that no worker like this one can serve.
UNFIT = (EngineUnavailable, NotSupported, ConfigError)
WRONG_INTERPRETER = (FileNotFoundError, PermissionError, NotADirectoryError)
#: Seconds until a job is looked at again for which every accelerator was in use.
NO_ROOM_PAUSE = 5.0
#: Seconds between looks at whether the worker shuts down.
TICK = 0.25
#: Seconds a runner gets to give its units back when the worker shuts down.
SHUTDOWN_GRACE = 10.0


@dataclasses.dataclass(frozen=True)
class RunnerKey:
    """Jobs of one owner that agree in all of this may follow each other in one runner."""

    owner: str
    queue: Queue
    engine: str


@dataclasses.dataclass
class _Idle:
    key: RunnerKey
    handle: RunnerHandle
    since: float


def absolute_roots(text: str) -> str:
    """SPIDER_DATA_ROOTS as it means the same in every folder."""
    roots = (Path(root).expanduser() for root in text.split(os.pathsep) if root)
    return os.pathsep.join(str(root.absolute()) for root in roots)


class Supervisor:
    """Serves hints, each in the thread that Celery calls ``work`` from."""

    def __init__(
        self, fleet: Fleet, settings: WorkerSettings, stopping: threading.Event | None = None
    ) -> None:
        """``stopping``, once set, lets every lane give its units back."""
        self._fleet = fleet
        self._settings = settings
        self._devices = DevicePool.of_host(settings.devices, settings.state / "devices")
        self._stopping = stopping or threading.Event()
        self._lock = threading.Lock()
        self._idle: list[_Idle] = []
        self._janitor: threading.Thread | None = None

    def close(self) -> None:
        """End the idle runners, and wait for it."""
        self._stopping.set()
        self._evict(time.monotonic())

    def work(self, job_id: str) -> None:
        """Work on the job while it has units for this worker. A hint may be stale or a
        duplicate; then there is nothing to claim, and that is all."""
        if self._stopping.is_set():
            return
        try:
            record = self._fleet.jobs.get(job_id)
        except JobNotFound:
            logger.warning("a hint names job %s, which does not exist", job_id)
            return
        if not self._has_room(record):
            # Not claimed: a unit that goes to and fro for hours would fill the job's history.
            self._fleet.units.later(job_id, NO_ROOM_PAUSE)
            return
        holder = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        claim = self._fleet.units.claim(job_id, holder, ANY_KIND)
        if isinstance(claim, NoUnit):
            return
        secrets: dict[str, str] = {}
        try:
            secrets = self._fleet.jobs.secrets(job_id)
            key, handle = self._runner_for(record, claim, secrets, holder)
        except UNFIT as error:
            reason = "engine_unavailable" if isinstance(error, EngineUnavailable) else "refused"
            self._fleet.units.fail(claim, error.message, fatal=True, reason=reason)
            return
        except FleetUnavailable:
            self._fleet.units.release(claim, "its worker could not reach Redis")
            raise
        except Exception as error:
            # Counted as an attempt: whatever it is, it must not go round for ever.
            why = redact(f"its worker could not start a runner: {error}", secrets)
            self._fleet.units.fail(claim, why)
            raise
        if handle is None:
            self._fleet.units.release(claim, "the worker's accelerators are in use")
            return
        try:
            handle.begin(job_id, secrets)
            reusable = self._lane(handle, record, claim, secrets)
        except BaseException as error:
            # Nobody will serve this runner any more, so it must not go on holding units.
            handle.stop(0)
            why = handle.redact(f"its worker failed: {error}")
            self._bury(handle, (claim, *handle.claims), why)
            raise
        self._put_away(key, handle, reusable)

    def _has_room(self, record: JobRecord) -> bool:
        """Could a runner of this job start here now? Wrong guesses cost a claim, no more."""
        try:
            needed = devices_needed(parse_job(record.document))
            if self._idle or not needed:
                return True
            probe = self._devices.take(needed)
        except (SpiderError, OSError):
            return True  # to be claimed, and refused with a word in the record
        if probe is not None:
            probe.release()
        return probe is not None

    def _lane(
        self, handle: RunnerHandle, record: JobRecord, first: Claim, secrets: dict[str, str]
    ) -> bool:
        """Serve the runner until it is idle (True) or gone."""
        job_id = record.job_id
        job = {"document": record.document, "secrets": secrets, "owner": record.owner}
        handle.give(first, job=job)
        last_sign = time.monotonic()
        try:
            while True:
                message = handle.receive(TICK)
                if self._stopping.is_set():
                    handle.stop(SHUTDOWN_GRACE)
                    self._give_back(handle, "its worker shut down")
                    return False
                if message is None:
                    if time.monotonic() - last_sign > self._settings.runner_silence:
                        logger.error("runner %s is silent: killing it", handle.holder)
                        handle.kill()
                    continue
                last_sign = time.monotonic()
                if message["op"] == "idle" and not handle.claims:
                    return True
                self._answer(handle, job_id, first.life, message)
        except RunnerGone as error:
            self._bury(handle, handle.claims, error.message)
            return False

    def _answer(self, handle: RunnerHandle, job_id: str, life: int, message: Message) -> None:
        if message["op"] == "ended":
            handle.drop(message["unit"], message["fence"])
        elif message["op"] == "next":
            try:
                found = self._fleet.units.claim(job_id, handle.holder, message["kinds"], life=life)
            except FleetUnavailable as error:
                # The runner goes idle; the reaper hints again once Redis is back.
                logger.warning("no further unit for %s: %s", handle.holder, error)
                found = NoUnit(None)
            if isinstance(found, NoUnit):
                handle.tell("none", kinds=message["kinds"])
            else:
                handle.give(found, kinds=message["kinds"])

    def _bury(self, handle: RunnerHandle, claims: Sequence[Claim], why: str) -> None:
        """A runner died with units: each is a failed attempt, at once and not after a lease."""
        for claim in claims:
            handle.drop(claim.unit, claim.fence)
            try:
                if self._fleet.jobs.stop_requested(claim.job_id):
                    self._fleet.units.release(claim, why)
                else:
                    self._fleet.units.fail(claim, handle.redact(why))
            except LeaseLost:
                logger.info("%s of %s was taken over already", claim.unit, claim.job_id)
            except FleetUnavailable as error:
                logger.warning("%s waits for the reaper: %s", claim.unit, error)

    def _give_back(self, handle: RunnerHandle, why: str) -> None:
        for claim in handle.claims:
            handle.drop(claim.unit, claim.fence)
            try:
                self._fleet.units.release(claim, why)
            except (LeaseLost, FleetUnavailable) as error:
                logger.info("%s not given back: %s", claim.unit, error)

    def _runner_for(
        self, record: JobRecord, claim: Claim, secrets: dict[str, str], holder: str
    ) -> tuple[RunnerKey, RunnerHandle | None]:
        """A warm runner of the same kind, else a new one; None while devices are in use."""
        job = parse_job(record.document)
        engine = runner_key(job, record.job_id, secrets)
        key = RunnerKey(record.owner, record.queue, engine)
        warm = self._take_warm(key)
        if warm is not None:
            warm.holder = holder
            return key, warm
        # An idle engine is kept for a job like its own; this one is another and needs the room.
        self._evict_beside(claim)
        devices = self._devices.take(devices_needed(job))
        if devices is None:
            return key, None
        return key, self._start(record.queue, holder, devices)

    def _start(self, queue: Queue, holder: str, devices: Devices) -> RunnerHandle:
        variable = f"python_{queue.value.replace('-', '_')}"
        python = getattr(self._settings, variable) or sys.executable
        if os.sep in python:  # relative to the worker's folder, which is not the runner's
            python = os.path.abspath(python)
        env = {name: value for name, value in os.environ.items() if name not in WITHHELD}
        # The worker may have been given relative paths; the runner's folder is another.
        env["SPIDER_ARTIFACTS"] = str(self._fleet.artifacts.root)
        env["SPIDER_STATE"] = str(self._settings.state.absolute())
        env["SPIDER_ENV_CACHE"] = str(self._settings.env_cache.absolute())
        if self._settings.data_roots:
            env["SPIDER_DATA_ROOTS"] = absolute_roots(self._settings.data_roots)
        # mimalloc keeps what Arrow freed, which makes memory grow with the data that was read.
        env.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
        # Also where it takes none: what it did not lock is not its own. Where no device was found,
        # torch or vLLM may know better what there is.
        if self._devices.ids or self._settings.devices is not None:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(devices.ids)
        command = [python, "-m", "spider_worker.runner"]
        folder = self._settings.state.absolute() / "runners"
        try:
            return RunnerHandle(self._fleet, holder, command, env, devices, folder)
        except BaseException as error:
            devices.release()
            if not isinstance(error, WRONG_INTERPRETER) and getattr(error, "errno", 0) != ENOEXEC:
                raise
            raise EngineUnavailable(
                f"the interpreter of queue {queue.value} cannot be started: {error} "
                f"(SPIDER_{variable.upper()})"
            ) from error

    def _take_warm(self, key: RunnerKey) -> RunnerHandle | None:
        with self._lock:
            for idle in self._idle:
                if idle.key == key and idle.handle.alive:
                    self._idle.remove(idle)
                    return idle.handle
        return None

    def _put_away(self, key: RunnerKey, handle: RunnerHandle, reusable: bool) -> None:
        if not reusable or self._settings.runner_idle <= 0 or self._stopping.is_set():
            handle.stop(SHUTDOWN_GRACE)
            return
        with self._lock:
            self._idle.append(_Idle(key, handle, time.monotonic()))
            if self._janitor is None:
                self._janitor = threading.Thread(
                    target=self._tidy, name="spider-janitor", daemon=True
                )
                self._janitor.start()

    def _tidy(self) -> None:
        """Stop runners that nobody wanted for long enough."""
        while not self._stopping.wait(TICK):
            self._evict(time.monotonic() - self._settings.runner_idle)

    def _evict_beside(self, claim: Claim) -> None:
        """End the idle runners. That may take longer than a lease, and nobody renews the claim's
        but us until its runner is there."""
        evicting = threading.Thread(target=self._evict, args=(time.monotonic(),))
        evicting.start()
        while evicting.is_alive():
            evicting.join(self._fleet.settings.beat)
            try:
                self._fleet.units.beat(claim.job_id, [claim])
            except FleetUnavailable as error:
                logger.warning("no heartbeat for %s: %s", claim.unit, error)

    def _evict(self, idle_since: float) -> None:
        with self._lock:
            out = [idle for idle in self._idle if idle.since <= idle_since]
            self._idle = [idle for idle in self._idle if idle.since > idle_since]
        for idle in out:
            idle.handle.stop(SHUTDOWN_GRACE)
