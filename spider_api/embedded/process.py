"""One program of the embedded fleet: started tethered, watched, stopped in steps."""

from __future__ import annotations

__all__ = ["Program", "StopStep"]

import dataclasses
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from spider_api.embedded import tether

LOG_TAIL = 20  #: lines of a log that an error quotes


@dataclasses.dataclass(frozen=True)
class StopStep:
    """Send ``signal`` and allow ``seconds`` for the program to end."""

    signal: signal.Signals
    seconds: float


KILL = StopStep(signal.SIGKILL, 10.0)


class Program:
    """A child process in a session of its own, so that Ctrl-C on the terminal reaches only
    ``spider up``, which then stops its children in order.

    ``name`` is for people; ``on_death`` is the signal it gets should its parent be killed;
    ``steps`` how it is stopped (SIGKILL follows). Standard output and error go to ``log``,
    whose predecessor is kept as ``<name>.log.1``.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        log: Path,
        on_death: signal.Signals = signal.SIGKILL,
        steps: Sequence[StopStep] = (StopStep(signal.SIGTERM, 10.0),),
    ) -> None:
        self.name = name
        self.log = log
        self._arguments = list(arguments)
        self._env = dict(env)
        self._cwd = cwd
        self._on_death = on_death
        self._steps = (*steps, KILL)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it from the calling thread, which must outlive it (see ``tether``)."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.log.exists():
            self.log.replace(self.log.with_name(self.log.name + ".1"))
        with _open_private(self.log) as output:
            self._process = subprocess.Popen(  # noqa: S603
                tether.command(self._on_death, self._arguments),
                env=self._env,
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs (or was never started)."""
        return None if self._process is None else self._process.poll()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log_tail(self) -> str:
        """The last lines it wrote, or an empty string."""
        if not self.log.exists():
            return ""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL:])

    def stop(self) -> None:
        """End the program and whatever of its session is left. Idempotent."""
        if self._process is None:
            return
        for step in self._steps:
            if self._process.poll() is not None:
                break
            self._process.send_signal(step.signal)
            try:
                self._process.wait(step.seconds)
            except subprocess.TimeoutExpired:
                continue
        self._sweep_session()

    def kill(self) -> None:
        """Send SIGKILL and return at once; for a person who will not wait for ``stop``."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def _sweep_session(self) -> None:
        """Kill stragglers of its process group (gunicorn's workers, had the master died)."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return  # nobody left; macOS says EPERM of a group of zombies


def _open_private(path: Path) -> IO[bytes]:
    """Logs can quote prompts and rows: only their owner reads them."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    return os.fdopen(descriptor, "ab")
