"""A bound on the number of processes, where the kernel lets them be counted in a group.

``RLIMIT_NPROC`` does not hold for root, and a worker in a container is root. Both versions of
control groups are known; where neither may be written to there is no bound but the host's.
"""

from __future__ import annotations

__all__ = ["PIDS", "can_bound", "pids_group"]

import contextlib
import functools
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from spider_sdk.errors import WorkspaceError

#: Processes and threads of what an agent or a task runs in a container, or in a command.
PIDS: Final = 4096
_MOUNT: Final = Path("/sys/fs/cgroup")
_PATIENCE: Final = 5.0


@contextlib.contextmanager
def pids_group(name: str, limit: int) -> Iterator[Path | None]:
    """The ``cgroup.procs`` of a new group of at most ``limit`` processes and threads; None where
    there can be none. What is left in it at the end is killed.

    Raises WorkspaceError where there are too many groups already.
    """
    root = _root()
    if root is None:
        yield None
        return
    try:
        group = _make(root, name)
    except OSError as error:
        raise WorkspaceError(f"no group for processes could be made: {error}") from error
    try:
        (group / "pids.max").write_text(str(limit))
        yield group / "cgroup.procs"
    finally:
        _remove(group)


def can_bound() -> bool:
    return _root() is not None


@functools.cache
def _root() -> Path | None:
    """Our own group in the hierarchy that counts processes, if groups can be made in it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = _MOUNT / path.lstrip("/")
        elif "pids" in controllers.split(","):
            root = _MOUNT / "pids" / path.lstrip("/")
        else:
            continue
        try:
            probe = _make(root, "probe")
        except OSError:
            continue
        counts = (probe / "pids.max").exists()
        probe.rmdir()
        if counts:
            return root
    return None


def _make(root: Path, name: str) -> Path:
    """Named anew each time: a worker that was killed leaves groups, and its process id."""
    return Path(tempfile.mkdtemp(prefix=f"spider-{os.getpid()}-{name}-", dir=root))


def _remove(group: Path) -> None:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(OSError):  # busy until the last one is reaped
            group.rmdir()
            return
        time.sleep(0.01)
