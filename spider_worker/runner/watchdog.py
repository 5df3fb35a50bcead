"""The dead-man pipe: without a supervisor that renews our leases, this process must end.

A supervisor that was killed closes the pipe; one that is stopped, or cannot reach Redis, falls
silent. Either way the leases run out and another worker may begin on the same units, so the
whole session (engine workers and sandboxes included) is killed before that, not asked.
"""

from __future__ import annotations

__all__ = ["Watchdog"]

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable

from spider_worker.control import LineReader, Message

STDOUT = 1


class Watchdog:
    """Reads the control pipe on a thread; passes everything but beats' meaning on."""

    def __init__(self, descriptor: int, lease: float) -> None:
        self._descriptor = descriptor
        # Until the first beat: the claim that started us was fresh.
        self._until = time.monotonic() + lease
        self._forward: Callable[[Message], object] | None = None

    def start(self, forward: Callable[[Message], object]) -> None:
        """Begin to read; ``forward`` is called from the reading thread."""
        self._forward = forward
        threading.Thread(target=self._read, name="control", daemon=True).start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _read(self) -> None:
        assert self._forward is not None
        for message in LineReader(self._descriptor):
            if message["op"] == "beat":
                self._until = message["until"]
            self._forward(message)
        _die("the supervisor is gone")

    def _watch(self) -> None:
        while (left := self._until - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))
        _die("no heartbeat from the supervisor: the leases may be another's by now")


def _die(why: str) -> None:
    # Not through sys.stdout: with its reader stopped the pipe is full, whoever printed last
    # holds the stream's lock, and the process that must end would wait for ever.
    if select.select([], [STDOUT], [], 0)[1]:
        with contextlib.suppress(OSError):
            os.write(STDOUT, f"runner ends itself: {why}\n".encode())
    os.killpg(os.getpgid(0), signal.SIGKILL)
