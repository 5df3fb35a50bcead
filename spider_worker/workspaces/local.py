"""Boxes that are folders of this host and nothing more: for tests that are trusted.

A command may do whatever the worker's user may: read its files, use its network, see and end
other processes. What it starts is ended with it all the same (``warden``), unless it ends its
warden first. That is no place for an agent whose model nobody answers for, so whoever wants it
says so twice: ``workspace: local`` in the job, and an operator who allows it.
"""

from __future__ import annotations

__all__ = ["LocalBox", "LocalWorkspace"]

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from spider_sdk.errors import EngineUnavailable
from spider_worker.swe_tasks.base import Task
from spider_worker.workspaces.base import READ_BYTES, Finished
from spider_worker.workspaces.origin import check_out
from spider_worker.workspaces.process import run_command
from spider_worker.workspaces.tree import put_file, read_file, remove_folder


class LocalBox:
    """A folder that holds ``tree``, an empty ``home`` and the ``vault``."""

    def __init__(self, folder: Path, *, python: str) -> None:
        self.vault = folder / "vault"
        self.vault_path = str(self.vault)
        self._tree = folder / "tree"
        self._env = {
            "PATH": os.pathsep.join((str(Path(python).parent), os.environ.get("PATH", os.defpath))),
            "HOME": str(folder / "home"),
            "LANG": "C.UTF-8",
            "TZ": "UTC",
            "USER": "agent",
        }

    @property
    def path(self) -> str:
        return str(self._tree)

    async def run(
        self,
        command: Sequence[str],
        *,
        timeout: float,  # noqa: ASYNC109 - it kills, cancelling waits
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        network: bool = False,  # noqa: ARG002 - nothing here could take it away
        stdout: Path | None = None,
    ) -> Finished:
        whole = {**self._env, **(env or {})}
        return await run_command(
            command, timeout=timeout, stdin=stdin, env=whole, cwd=self._tree, stdout=stdout
        )

    async def put(self, name: str, content: bytes, *, executable: bool = False) -> None:
        await asyncio.to_thread(put_file, self._tree, name, content, executable=executable)

    async def read(self, name: str, *, limit: int = READ_BYTES) -> bytes | None:
        return await asyncio.to_thread(read_file, self._tree, name, limit=limit)


class LocalWorkspace:
    """Boxes under ``root``, a folder that is made where it is missing. ``allowed`` is the
    operator's word that this host may run what the boxes run. ``python`` comes first on the PATH
    of commands; None is the worker's own. ``allow_private`` lets repositories come from private
    addresses."""

    kind = "local"

    def __init__(
        self, root: Path, *, allowed: bool, python: str | None = None, allow_private: bool = False
    ) -> None:
        self._root = root
        self._allow_private = allow_private
        self._allowed = allowed
        self._python = python or sys.executable

    async def check(self) -> None:
        if not self._allowed:
            raise EngineUnavailable(
                "workspace: local runs an agent's commands on this worker's host with nothing in"
                " between, which its operator has not allowed (SPIDER_ALLOW_LOCAL_WORKSPACE=true"
                " does). Take bwrap or docker"
            )
        if shutil.which("git") is None:
            raise EngineUnavailable("workspace: local needs git on this worker's PATH")

    @contextlib.asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[LocalBox]:
        await self.check()
        self._root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="box-", dir=self._root))
        try:
            (folder / "home").mkdir()
            (folder / "vault").mkdir()
            await check_out(task, folder / "tree", allow_private=self._allow_private)
            yield LocalBox(folder, python=self._python)
        finally:
            await asyncio.to_thread(remove_folder, folder)
