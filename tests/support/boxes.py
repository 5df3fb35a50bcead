"""Workspaces for tests, and a task whose origin is a folder with one commit."""

from __future__ import annotations

__all__ = ["KINDS", "alive", "bare_task", "workspace"]

import os
import subprocess
from pathlib import Path

from spider_worker.swe_tasks.base import Origin, Task
from spider_worker.workspaces.base import Workspace
from spider_worker.workspaces.bwrap import BwrapWorkspace
from spider_worker.workspaces.local import LocalWorkspace

#: The kinds that need no engine; a host whose kernel forbids bubblewrap cannot test half of this.
KINDS = ("bwrap", "local")


def workspace(kind: str, root: Path) -> Workspace:
    return BwrapWorkspace(root) if kind == "bwrap" else LocalWorkspace(root, allowed=True)


def bare_task(folder: Path) -> Task:
    """A task without a fault: ``a.txt`` in one commit."""
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("one\n")
    for command in (
        ("init", "-q", "-b", "main"),
        ("add", "-A"),
        ("-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "-m", "Start"),
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return Task("i-1", "tests/bare", "Nothing is wrong.", Origin("dir", str(folder)))


def alive(marker: str) -> list[str]:
    """Command lines of processes that have ``marker`` in theirs."""
    found = []
    for name in os.listdir("/proc"):
        try:
            line = Path(f"/proc/{name}/cmdline").read_bytes() if name.isdigit() else b""
        except OSError:
            continue
        if marker.encode() in line and int(name) != os.getpid():
            found.append(line.decode(errors="replace"))
    return found
