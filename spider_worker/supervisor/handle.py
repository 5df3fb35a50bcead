"""A runner process as its supervisor holds it: pipes, heartbeats, logs and the end."""

from __future__ import annotations

__all__ = ["RunnerGone", "RunnerHandle"]

import contextlib
import logging
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from spider_sdk.errors import FleetUnavailable, SpiderError
from spider_worker.control import LineReader, Message, redact, send
from spider_worker.fleet import Claim, Fleet
from spider_worker.supervisor.devices import Devices

logger = logging.getLogger(__name__)

#: Part of the lease after which a runner without a beat ends itself.
SELF_FENCE = 0.8
#: Seconds between looks at the job's cancel flag.
POLL = 0.5
#: Seconds between the pipeline's grace, SIGTERM and SIGKILL.
ESCALATION = 1.0
DEFAULT_GRACE = 10.0


class RunnerGone(SpiderError):
    """The runner process ended."""


class RunnerHandle:
    """One runner subprocess, in a session of its own so that it ends with all its children."""

    def __init__(
        self,
        fleet: Fleet,
        holder: str,
        command: Sequence[str],
        env: Mapping[str, str],
        devices: Devices,
        folder: Path,
    ) -> None:
        self.holder = holder
        self.devices = devices
        self._fleet = fleet
        self._lock = threading.Lock()
        self._claims: list[Claim] = []
        self._job_id: str | None = None
        self._turn = 0  #: counts the jobs served
        self._secrets: list[Mapping[str, str]] = []  #: of all of them: lines come late
        self._log: IO[bytes] | None = None
        self._pumped = False  #: the runner's output has ended: nobody would close another log
        self._grace = DEFAULT_GRACE
        self._cancelled_at: float | None = None
        self._gone = threading.Event()
        self._inbox: queue.Queue[Message] = queue.Queue()
        self._control_lock = threading.RLock()  #: taken before ``_lock`` where both are
        self._control: int | None
        folder.mkdir(parents=True, exist_ok=True)
        control_read, self._control = os.pipe()
        self._report, report_write = os.pipe()
        try:
            self.process = subprocess.Popen(  # noqa: S603 (our own module)
                [*command, "--control", str(control_read), "--report", str(report_write)],
                env=dict(env),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(control_read, report_write, *devices.locks),
                start_new_session=True,
            )
        except BaseException:
            os.close(self._control)
            os.close(self._report)
            raise
        finally:
            os.close(control_read)
            os.close(report_write)
        for target in (self._read_reports, self._pump_log, self._keep_alive, self._await_exit):
            threading.Thread(target=target, name=f"{holder}-{target.__name__}", daemon=True).start()

    @property
    def alive(self) -> bool:
        return not self._gone.is_set()

    @property
    def job_id(self) -> str | None:
        return self._job_id

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What the runner holds now."""
        with self._lock:
            return tuple(self._claims)

    def begin(self, job_id: str, secrets: Mapping[str, str]) -> None:
        """The units that follow are this job's."""
        with self._control_lock, self._lock:
            self._turn += 1
            self._job_id = job_id
            if secrets and secrets not in self._secrets:
                self._secrets.append(dict(secrets))
            self._cancelled_at, self._grace = None, DEFAULT_GRACE
            if self._log is not None:
                self._log.close()
                self._log = None
            if not self._pumped:
                path = self._fleet.artifacts.log_file(job_id, self.holder)
                self._log = path.open("ab", buffering=0)

    def give(self, claim: Claim, **fields: object) -> None:
        """Hand a claimed unit over; its lease is kept from here on."""
        with self._control_lock:  # a cancel must not reach the runner before what it is for
            with self._lock:
                self._claims.append(claim)
            self.tell("unit", claim=claim.to_json(), **fields)

    def drop(self, unit: str, fence: int) -> None:
        """The runner ended that claim."""
        with self._lock:
            self._claims = [c for c in self._claims if (c.unit, c.fence) != (unit, fence)]

    def tell(self, op: str, **fields: object) -> None:
        """Send a message; a runner that is gone is noticed by ``receive``."""
        with self._control_lock, contextlib.suppress(OSError):
            if self._control is not None:
                send(self._control, op, **fields)

    def receive(self, timeout: float) -> Message | None:
        """The runner's next message, None after ``timeout`` seconds. Raises RunnerGone."""
        try:
            message = self._inbox.get(timeout=timeout)
        except queue.Empty:
            return None
        if message["op"] == "gone":
            raise RunnerGone(message["why"])
        if message["op"] == "grace":
            self._grace = float(message["seconds"])
        return message

    def redact(self, text: str) -> str:
        for secrets in self._secrets:
            text = redact(text, secrets)
        return text

    def stop(self, grace: float) -> None:
        """Ask the runner to give its units back and exit; kill it after ``grace`` seconds."""
        self.tell("stop")
        if not self._gone.wait(grace):
            self.kill()
        self._gone.wait(ESCALATION * 5)

    def kill(self) -> None:
        """SIGTERM to the whole session, then SIGKILL."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            if self._gone.wait(ESCALATION):
                return

    def _keep_alive(self) -> None:
        """Renew leases, pass on what the renewal learns, escalate a cancel that is not obeyed.

        A beat goes to the runner only after its leases are renewed: while Redis is away
        none does, and the runner ends itself before anybody else could claim its units.
        """
        settings = self._fleet.settings
        next_beat = 0.0
        while not self._gone.wait(min(POLL, settings.beat)):
            now = time.monotonic()
            try:
                if now >= next_beat:
                    self._beat(now)
                    next_beat = now + settings.beat
                with self._lock:
                    turn, job_id = self._turn, self._job_id
                if job_id and self._cancelled_at is None and self.claims:
                    if self._fleet.jobs.stop_requested(job_id):
                        self._cancel(now, turn)
            except FleetUnavailable as error:
                logger.warning("no heartbeat for %s: %s", self.holder, error)
            if self._cancelled_at and now > self._cancelled_at + self._grace + ESCALATION:
                if self.claims:
                    logger.warning("%s ignores the cancel of %s", self.holder, self._job_id)
                    self.kill()

    def _beat(self, now: float) -> None:
        with self._lock:
            turn, claims = self._turn, tuple(self._claims)
        beat = self._fleet.units.beat(claims[0].job_id, claims) if claims else None
        # A large job on its way to a runner that still starts holds the pipe: the leases are
        # renewed meanwhile, and the runner hears of it with the next beat.
        if not self._control_lock.acquire(timeout=POLL):
            return
        try:
            for claim in beat.lost if beat else ():
                self.drop(claim.unit, claim.fence)
                self.tell("lost", unit=claim.unit, fence=claim.fence)
            self.tell("beat", until=now + SELF_FENCE * self._fleet.settings.lease)
        finally:
            self._control_lock.release()
        if beat and beat.cancelled:
            self._cancel(now, turn)

    def _cancel(self, now: float, turn: int) -> None:
        """Tell the runner to stop, unless another job has its turn by now."""
        if not self._control_lock.acquire(timeout=POLL):
            return
        try:
            with self._lock:
                if turn != self._turn or self._cancelled_at is not None:
                    return
                self._cancelled_at = now
            self.tell("cancel")
        finally:
            self._control_lock.release()

    def _read_reports(self) -> None:
        for message in LineReader(self._report):
            self._inbox.put(message)
        os.close(self._report)

    def _pump_log(self) -> None:
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            line = self.redact(raw.decode("utf-8", "replace"))
            try:
                with self._lock:
                    if self._log is not None:
                        self._log.write(line.encode())
                    else:
                        logger.info("%s: %s", self.holder, line.rstrip())
            except OSError as error:
                # A full disk costs lines. A pipe that nobody reads would stop the runner.
                logger.warning("a line of %s is lost: %s", self.holder, error)
        self.process.stdout.close()
        with self._lock:
            self._pumped = True
            if self._log is not None:
                self._log.close()
                self._log = None

    def _await_exit(self) -> None:
        code, control = self.process.wait(), self._control
        assert control is not None
        # Whatever it started goes with it: an engine's worker must not keep the device.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._gone.set()
        self.devices.release()
        with self._control_lock:  # a number closed under a writer could be another file's by then
            os.close(control)
            self._control = None
        why = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._inbox.put({"op": "gone", "why": f"the runner ended with {why}"})
