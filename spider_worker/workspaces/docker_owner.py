"""Whose containers are whose: each process has a name for as long as it lives.

An engine keeps containers when the process that made them dies. So every process that makes some
has a file with its name, which it holds locked: the kernel lets go of the lock when the process
ends, however it ends. A name whose file can be locked is nobody's any more, and what carries it is
swept by whoever comes next to the same folder; what a living process has is left alone.
"""

from __future__ import annotations

__all__ = ["claim_owner", "sweep_abandoned"]

import contextlib
import fcntl
import functools
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from spider_sdk.errors import WorkspaceError
from spider_worker.workspaces.docker import DockerWorkspace

log = logging.getLogger(__name__)


@functools.cache
def claim_owner(folder: Path) -> str:
    """This process's name among those of ``folder``, which is made. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        name = uuid.uuid4().hex
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # never closed: it is held as long as we live
        if _is_at(descriptor, folder / name):
            return name
        os.close(descriptor)  # a sweep saw the file before it was locked, and took it away


async def sweep_abandoned(folder: Path, root: Path) -> int:
    """Remove the containers of processes that had a name in ``folder`` and are no more, and their
    vaults under ``root``; how many containers there were. What cannot be removed is left for the
    next time."""
    swept = 0
    for name in _names(folder):
        with _abandoned(folder / name) as abandoned:
            if not abandoned:
                continue
            try:
                swept += await DockerWorkspace(root, owner=name).sweep()
            except WorkspaceError as error:
                log.warning("containers that a worker left cannot be swept: %s", error.message)
            else:
                (folder / name).unlink(missing_ok=True)
    return swept


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def _abandoned(file: Path) -> Iterator[bool]:
    """Whether nobody holds the file, which we do then: two sweeps do not take the same one."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _lock(descriptor) and _is_at(descriptor, file)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False
