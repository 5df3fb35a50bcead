"""A workspace kind gives boxes: places where the commands of one instance, and no others, run.

The same code prepares a tree, lets an agent work on it and runs its tests in every kind; only how
a command is started differs. A box knows one folder, the tree, at a path of its own.
"""

from __future__ import annotations

__all__ = ["READ_BYTES", "Box", "Finished", "Workspace"]

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final, Protocol

from spider_worker.swe_tasks.base import Task

#: Bytes that are read of a file at most where the caller does not say.
READ_BYTES: Final = 64 << 20


@dataclasses.dataclass(frozen=True)
class Finished:
    """A command's end. ``code`` None: it ran past its time, and it and all that it had started was
    killed. ``output`` is standard output and error together, ``cut`` whether its middle was left
    out for its length."""

    code: int | None
    output: bytes
    seconds: float
    cut: bool = False

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def text(self) -> str:
        return self.output.decode("utf-8", "replace")


class Box(Protocol):
    """One instance's place."""

    @property
    def path(self) -> str:
        """The folder of the tree, as seen from inside; commands start there."""

    @property
    def vault(self) -> Path:
        """A folder of the host for what the agent is not to change, empty at first."""

    @property
    def vault_path(self) -> str:
        """Where commands see ``vault``, and cannot write to it (``local`` keeps nobody from it)."""

    async def run(
        self,
        command: Sequence[str],
        *,
        timeout: float,  # noqa: ASYNC109 - it kills, cancelling waits
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        network: bool = False,
        stdout: Path | None = None,
    ) -> Finished:
        """Run a command to its end, with an environment that holds nothing of the host's but what
        programs cannot do without (PATH, HOME, LANG, TZ, USER) and ``env``. With ``stdout``, a
        file of the host that is made, its standard output goes there, and ``output`` is its
        standard error.

        Processes that it leaves behind are killed. Raises WorkspaceError where it could not be
        started at all.
        """

    async def put(self, name: str, content: bytes, *, executable: bool = False) -> None:
        """Write a file of the tree, ``name`` relative to it, in place of what is there; folders
        above it are made. Raises WorkspaceError where it cannot be written."""

    async def read(self, name: str, *, limit: int = READ_BYTES) -> bytes | None:
        """The first ``limit`` bytes of a file of the tree; None where there is none.

        No link leads out of the box. Raises WorkspaceError for what is no regular file.
        """


class Workspace(Protocol):
    """A kind of place: ``docker``, ``bwrap`` or ``local``."""

    kind: str

    async def check(self) -> None:
        """Raise EngineUnavailable, with what to do, where boxes of this kind cannot be had here."""

    def open(self, task: Task) -> AbstractAsyncContextManager[Box]:
        """A fresh box whose tree is the task's origin at its base commit, the origin's history
        still in it and no patch applied. Leaving the context kills what runs there and removes it.

        Raises WorkspaceError where the origin cannot be had (an image that cannot be pulled, a
        commit that is not there).
        """
