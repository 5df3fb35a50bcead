"""Processes that a killed or hasty worker leaves: this process inherits and ends them.

A runner lives in a session of its own, beyond its worker's process group, and exits when its
dead-man pipe closes. That takes a moment (it may hold a model), and a runner that hangs would
stay for good. Linux gives orphans to the nearest ancestor that asked for them
(PR_SET_CHILD_SUBREAPER), so that ``spider up`` can wait for them by their ids before it says that
everything has stopped. Elsewhere nothing is adopted, and runners end by their pipes alone.
"""

from __future__ import annotations

__all__ = ["Orphans"]

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
INTERVAL = 0.05


class Orphans:
    """From its construction on, orphaned descendants become children of this process. Those
    children that there were before are left alone."""

    def __init__(self) -> None:
        self._ours = sys.platform.startswith("linux")
        if self._ours and ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            self._ours = False  # a kernel before 3.4
        self._before = _children() if self._ours else set()

    def end(self, known: set[int], seconds: float) -> None:
        """Wait for every adopted child; SIGKILL those that are there after ``seconds``.

        ``known`` are children that somebody else waits for.
        """
        if not self._ours:
            return
        deadline = time.monotonic() + seconds
        while orphans := _children() - self._before - known:
            for pid in orphans:
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)  # not yet waited for, so the id is still its own
                os.waitpid(pid, os.WNOHANG)
            time.sleep(INTERVAL)


def _children() -> set[int]:
    me = os.getpid()
    return {int(path.name) for path in Path("/proc").glob("[0-9]*") if _parent(path) == me}


def _parent(process: Path) -> int | None:
    try:
        # The name, in brackets, may hold anything; the state and the parent follow it.
        return int((process / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return None  # it ended meanwhile
