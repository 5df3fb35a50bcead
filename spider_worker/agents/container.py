"""Episodes in containers: the agent's own interpreter is shown in the instance's image.

Nothing is installed in an image and none is built: the environment and the interpreter that it is
made on are mounted read-only, where they are on the host. So it must be no place that images have
themselves, and the interpreter has to run on the oldest C library of the images; those that uv
installs do.
"""

from __future__ import annotations

__all__ = ["ContainerHost", "container_mounts"]

import asyncio
import contextlib
import logging
import os
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from spider_sdk.errors import EngineUnavailable, WorkspaceError
from spider_worker.agents.episode import Heard, Listener, run_episode
from spider_worker.agents.hosts import ModelHost
from spider_worker.agents.interpreter import HELP_IN_IMAGES, INPUTRC, QUIET, library
from spider_worker.agents.proxy import LlmProxy, Ticket
from spider_worker.workspaces.base import Box
from spider_worker.workspaces.docker import TREE, DockerBox
from spider_worker.workspaces.docker_client import docker_environment
from spider_worker.workspaces.interpreter import interpreter_roots

log = logging.getLogger(__name__)

_LIBRARY: Final = "/run/spider/lib"
_SOCKETS: Final = "/run/spider/sockets"
_BOOT: Final = (
    "import os, sys; os.makedirs(os.environ['HOME'], exist_ok=True); "
    f"sys.path.insert(0, {_LIBRARY!r}); from spider_agent.__main__ import main; main()"
)
_ENVIRONMENT: Final = {
    **QUIET,
    "HOME": "/tmp/.agent-home",  # noqa: S108 - the container's
    "INPUTRC": f"{_LIBRARY}/{INPUTRC}",
}
#: What images have themselves. Whatever is mounted over one of these, or over what it lies in, or
#: into it, takes the place of the programs that tests run with.
_IMAGES_OWN: Final = (
    "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc",
    *(f"{prefix}/{name}" for prefix in ("/usr", "/usr/local") for name in ("bin", "sbin", "lib")),
    *(
        f"{root}/{name}" for root in ("/opt/miniconda3", "/opt/conda")
        for name in ("bin", "lib", "envs/testbed")
    ),
    TREE,
)  # fmt: skip


def container_mounts(python: str, folder: Path, sockets: Path) -> list[tuple[str, str]]:
    """What containers are to be shown for agents to run in them; ``folder`` is for the library,
    ``sockets`` for those of proxies. Both must be there as long as the containers are.

    Raises EngineUnavailable for an interpreter that cannot be shown beside what images have.
    """
    roots = [(root, root) for root in interpreter_roots(python)]
    for root, _ in roots:
        if any(_overlap(Path(root), Path(own)) for own in _IMAGES_OWN):
            raise EngineUnavailable(
                f"workspace: docker: the agents' interpreter {python} needs {root} of this host, "
                "which in a container would hide what the image has there, and change what its "
                f"tests say. {HELP_IN_IMAGES}"
            )
    shown = library(folder / "lib")
    return [*roots, (str(shown), _LIBRARY), (str(sockets), _SOCKETS)]


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


class _Exec:
    """A ``docker exec``. Killing its client leaves what runs in the container, which a restart
    ends. ``died`` says, once it has ended, whether the container did so by itself."""

    def __init__(self, process: subprocess.Popen[bytes], box: DockerBox) -> None:
        self._process = process
        self._box = box
        self.died = False
        self.ended: asyncio.Future[int] = asyncio.ensure_future(self._end())

    async def _end(self) -> int:
        code = await _exit_status(self._process)
        # Also where it ended by itself: an agent may leave processes behind.
        try:
            self.died = not await self._box.restart()
        except WorkspaceError as error:
            # Not raised: what has been heard of the agent would be lost with it.
            log.warning("after an episode, %s", error.message)
            self.died = True
        return code

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


def _start(box: DockerBox, command: Sequence[str], descriptors: Sequence[int]) -> _Exec:
    source, lines, printed = descriptors[:3]
    try:
        process = subprocess.Popen(  # noqa: S603 - in the container
            box.arguments(command, env=_ENVIRONMENT),
            stdin=source,
            stdout=lines,
            stderr=printed,
            env=docker_environment(),
            start_new_session=True,
        )
    except OSError as error:
        raise WorkspaceError(f"docker exec could not be started: {error}") from error
    return _Exec(process, box)


async def _exit_status(process: subprocess.Popen[bytes]) -> int:
    """Without a thread that waits: a loop has few, and episodes are long."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    handle = os.pidfd_open(process.pid)
    loop.add_reader(handle, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)
    return process.wait()


class ContainerHost(ModelHost):
    """Episodes in the containers of a workspace whose ``mounts`` are ``container_mounts``'s.
    Nothing is warm here: an agent's start takes its imports' time."""

    def __init__(self, python: str, llm: Mapping[str, Any], *, proxy: LlmProxy | None) -> None:
        super().__init__(llm, proxy=proxy)
        self._python = python

    async def run(
        self,
        box: Box,
        request: Mapping[str, Any],
        *,
        ticket: Ticket | None,
        log: Path,
        timeout: float,  # noqa: ASYNC109 - it kills, cancelling waits
        listener: Listener,
        stop: Callable[[], Awaitable[None]],
    ) -> Heard:
        assert isinstance(box, DockerBox)
        command = [self._python, "-I", "-c", _BOOT]
        if self._proxy is not None:
            command.append(f"{_SOCKETS}/{self._proxy.socket.name}")

        started: list[_Exec] = []

        async def start(descriptors: Sequence[int]) -> _Exec:
            started.append(_start(box, command, descriptors))
            return started[0]

        state = "/tmp/.agent-state"  # noqa: S108 - the container's
        with self._access(ticket) as llm:
            heard = await run_episode(
                start,
                {**request, "path": box.path, "state": state, "llm": llm},
                log=log,
                timeout=timeout,
                listener=listener,
                stop=stop,
            )
        if heard.status == "agent_error" and started[0].died:
            code = started[0].ended.result()
            heard.status = "workspace_error"
            heard.error = f"its container ended while it was at work ({code})"
        return await self._settle(ticket, heard)
