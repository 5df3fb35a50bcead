"""The warm pool: a process that has imported the SDK, and forks one for each episode."""

from __future__ import annotations

__all__ = ["AgentPool", "Child", "PoolGone"]

import array
import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from spider_sdk.errors import EngineUnavailable, WorkspaceError
from spider_worker.agents.interpreter import HELP, INPUTRC, QUIET, library
from spider_worker.workspaces.bwrap import (
    HOME,
    bwrap_arguments,
    bwrap_environment,
    write_names,
)
from spider_worker.workspaces.interpreter import interpreter_roots

_START_SECONDS: Final = 180.0
_PACKET: Final = 1 << 16
#: Places in the box that nothing else is mounted over.
_LIBRARY: Final = "/run/spider/lib"
_SOCKETS: Final = "/run/spider/sockets"
_ASIDE: Final = "/run/spider/aside"
_TMP: Final = "/tmp"  # noqa: S108 - the box's


class PoolGone(WorkspaceError):
    """The process that starts agents has ended."""


class Child:
    """A started episode. ``ended`` resolves to its exit status once nothing of it is alive;
    it raises PoolGone where that is not known."""

    def __init__(self, pool: AgentPool, number: int) -> None:
        self._pool = pool
        self.number = number
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def kill(self) -> None:
        """End it and all that it started; ``ended`` says when that is done."""
        if not self.ended.done():
            self._pool.send({"op": "kill", "id": self.number})


class AgentPool:
    """``python`` is the agent's interpreter. ``boxes`` is the folder that all trees lie under;
    None leaves episodes unconfined, for trees that are trusted (workspace ``local``).
    ``shell_python``'s folder comes first on the PATH of the agent's shell; ``hidden`` are folders
    that a confined agent sees nothing of."""

    def __init__(
        self,
        python: str,
        *,
        folder: Path,
        boxes: Path | None,
        shell_python: str,
        hidden: Sequence[Path] = (),
    ) -> None:
        self._hidden = tuple(hidden)
        self._python = python
        self._folder = folder
        self._boxes = boxes
        #: For Unix sockets that agents are to reach, as ``socket_path`` says. Not under ``folder``:
        #: a socket's path has 107 bytes at most.
        self.sockets = Path(tempfile.mkdtemp(prefix="spider-"))
        self._shell_python = shell_python
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._children: dict[int, Child] = {}
        self._number = 0
        self._ready: asyncio.Future[None] | None = None
        self._log: Path | None = None
        self._kept: list[str] = []
        self._starting = asyncio.Lock()
        self._closed = False

    @property
    def confined(self) -> bool:
        return self._boxes is not None

    def socket_path(self, name: str) -> str:
        """Where an agent finds the socket of that name in ``sockets``."""
        return str(self.sockets / name) if self._boxes is None else f"{_SOCKETS}/{name}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Start the process and wait until it has imported everything. Raises EngineUnavailable
        with what it said where it does not come up."""
        loop = asyncio.get_running_loop()
        self._closed = False
        self._ready = loop.create_future()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._log = self._folder / "zygote.log"
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            command, env = await asyncio.to_thread(self._command, theirs.fileno())
            with self._log.open("wb") as log:
                self._process = await asyncio.to_thread(
                    subprocess.Popen,
                    command,
                    env=env,
                    cwd=self._folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            raise EngineUnavailable(f"the agent's interpreter does not start: {error}") from error
        finally:
            theirs.close()
        self._control = ours
        loop.add_reader(ours.fileno(), self._receive)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await asyncio.shield(self._ready)
        except (TimeoutError, PoolGone) as error:
            await self._end()
            said = self._log.read_text(errors="replace").strip()[-2000:]
            raise EngineUnavailable(
                f"the agent's interpreter {self._python} does not come up: "
                f"{said or 'no word of it'}\n{HELP}"
            ) from error

    def _command(self, descriptor: int) -> tuple[list[str], dict[str, str]]:
        ours = library(self._folder / "lib")
        shown = str(ours) if self._boxes is None else _LIBRARY
        inside = [self._python, "-I", "-c", _BOOT.format(library=shown), str(descriptor)]
        env = bwrap_environment(self._shell_python) | QUIET | {"INPUTRC": f"{shown}/{INPUTRC}"}
        if self._boxes is None:
            home = self._folder / "home"
            home.mkdir(exist_ok=True)
            return inside, env | {"HOME": str(home), "TMUX_TMPDIR": str(home)}
        self._boxes.mkdir(parents=True, exist_ok=True)
        names, aside = self._folder / "names", self._folder / "aside"
        names.mkdir(exist_ok=True)
        aside.mkdir(exist_ok=True)
        write_names(names)
        roots = {*interpreter_roots(self._python), *interpreter_roots(self._shell_python)}
        self._kept = sorted(root for root in roots if Path(root).is_relative_to(_TMP))
        prefix = bwrap_arguments(
            names,
            roots=sorted(roots),
            read_only=[
                (str(ours), _LIBRARY),
                (str(self.sockets), _SOCKETS),
                (str(aside), _ASIDE),
            ],
            boxes=self._boxes,
            hidden=self._hidden,
        )
        prefix[0] = shutil.which("bwrap") or prefix[0]
        return [*prefix, *inside], env | {"HOME": HOME, "TMUX_TMPDIR": _TMP}

    async def close(self) -> None:
        """End the process and every episode with it. Idempotent."""
        self._closed = True
        await self._end()
        await asyncio.to_thread(shutil.rmtree, self.sockets, ignore_errors=True)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM if self._boxes is None else signal.SIGKILL)
            await asyncio.to_thread(process.wait)
        self._forget()

    async def fork(
        self,
        plan: Mapping[str, Any] | None,
        descriptors: Sequence[int],
        *,
        proxy: str | None = None,
    ) -> Child:
        """Start an episode's process (see ``spider_agent.zygote``); the descriptors stay the
        caller's to close. A process that was lost (killed for its memory, say) is started again
        first. Raises PoolGone, and WorkspaceError where none could be forked."""
        try:
            return await self._fork(plan, descriptors, proxy)
        except PoolGone:
            # It died before it could say that it had started one: nothing of that is alive.
            if self._closed:
                raise
            return await self._fork(plan, descriptors, proxy)

    async def _fork(
        self, plan: Mapping[str, Any] | None, descriptors: Sequence[int], proxy: str | None
    ) -> Child:
        async with self._starting:
            if self._control is None and not self._closed:
                await self._end()
                await self.start()
        self._number += 1
        child = Child(self, self._number)
        self._children[child.number] = child
        if plan is not None:
            plan = {**plan, "kept": self._kept, "aside": _ASIDE}
        message = {"op": "start", "id": child.number, "plan": plan, "proxy": proxy}
        self.send(message, descriptors)
        await child.started
        return child

    def send(self, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        if self._control is None:
            raise PoolGone
        ancillary = []
        if descriptors:
            numbers = array.array("i", descriptors)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)]
        try:
            self._control.sendmsg([json.dumps(message).encode()], ancillary)
        except OSError as error:
            self._forget()
            raise PoolGone from error

    def _receive(self) -> None:
        assert self._control is not None
        assert self._ready is not None
        while True:
            try:
                data = self._control.recv(_PACKET)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._forget()
                return
            self._heard(json.loads(data))

    def _heard(self, message: Mapping[str, Any]) -> None:
        assert self._ready is not None
        if message["op"] == "ready":
            self._ready.set_result(None)
            return
        child = self._children[message["id"]]
        match message["op"]:
            case "started":
                child.started.set_result(None)
            case "failed":
                del self._children[child.number]
                said = f"no process for the agent: {message['error']}"
                child.started.set_exception(WorkspaceError(said))
            case "ended":
                del self._children[child.number]
                child.ended.set_result(os.waitstatus_to_exitcode(message["status"]))

    def _forget(self) -> None:
        """The process is not there any more."""
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            self._control.close()
            self._control = None
        self._lose()

    def _lose(self) -> None:
        """Nobody will hear of what is not known by now."""
        children, self._children = list(self._children.values()), {}
        waiting: list[asyncio.Future[Any]] = [self._ready] if self._ready is not None else []
        for child in children:
            waiting += [child.started, child.ended]
        for future in waiting:
            if not future.done():
                future.set_exception(PoolGone())
                future.exception()  # whoever waits is told; nobody has to


_BOOT: Final = (
    "import sys; sys.path.insert(0, {library!r}); "
    "sys.argv = ['spider_agent', sys.argv[1]]; "
    "from spider_agent.zygote import main; main()"
)
