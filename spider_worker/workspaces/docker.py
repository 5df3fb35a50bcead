"""Boxes that are containers of an instance's own image, by way of the docker command line.

The tree is the image's ``/testbed``, and its Python that of the conda environment ``testbed`` where
the image has one, as in the public sets. A container has no network unless asked for, a bound on
its processes, and is gone with its box. Where a worker died, its containers stay; they carry the
name of their owner (``docker_owner``), by which ``sweep`` finds them.

The vault and ``mounts`` are folders of this host, so the engine has to be on this host too.
"""

from __future__ import annotations

__all__ = ["LABEL", "DockerBox", "DockerWorkspace"]

import asyncio
import contextlib
import glob
import json
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

from spider_sdk.errors import EngineUnavailable, WorkspaceError
from spider_worker.swe_tasks.base import Task
from spider_worker.workspaces.base import READ_BYTES, Finished
from spider_worker.workspaces.docker_client import docker
from spider_worker.workspaces.pids import PIDS
from spider_worker.workspaces.tree import remove_folder

TREE: Final = "/testbed"
VAULT: Final = "/vault"
#: Carried by every container; its value is the workspace's ``owner``.
LABEL: Final = "spider.workspace"
_CONDA: Final = ":".join(
    f"{root}/{folder}" for root in ("/opt/miniconda3", "/opt/conda")
    for folder in ("envs/testbed/bin", "bin")
)  # fmt: skip
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Processes of a container in which no command runs: the init and what it waits for.
_IDLE: Final = 2

_PUT: Final = """
set -eu
mkdir -p -- "$(dirname -- "$1")"
rm -f -- "$1"
cat > "$1"
chmod "$2" "$1"
"""
_READ: Final = """
[ -e "$1" ] || [ -L "$1" ] || exit 44
[ -f "$1" ] && [ ! -L "$1" ] || exit 45
head -c "$2" -- "$1"
"""


class DockerBox:
    """A running container. ``vault`` is mounted read-only, ``image_path`` is the image's PATH,
    ``networked`` whether it has a network all the time."""

    def __init__(self, name: str, *, vault: Path, image_path: str, networked: bool) -> None:
        self.name = name
        self.vault = vault
        self.vault_path = VAULT
        self._networked = networked
        self._env = {"PATH": f"{_CONDA}:{image_path}", "LANG": "C.UTF-8", "TZ": "UTC"}

    @property
    def path(self) -> str:
        return TREE

    def arguments(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None
    ) -> list[str]:
        """The command line on this host that runs ``command`` in the container, for a process
        that the caller keeps. Killing it does not end what runs in there: ``restart`` does."""
        variables = {**self._env, **(env or {})}
        options = [part for name in variables for part in ("-e", f"{name}={variables[name]}")]
        return ["docker", "exec", "-i", "-w", TREE, *options, self.name, *command]

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
        connect = network and not self._networked
        if connect:
            await self._switch("none", "bridge")
        settled = False
        try:
            _, *arguments = self.arguments(command, env=env)
            done = await docker(*arguments, timeout=timeout, stdin=stdin, stdout=stdout)
            # The client's end is not that of what it had started.
            if done.code is None or await self._busy():
                await self.restart()
            settled = True
        finally:
            if not settled:
                await _finish(self.restart())
            if connect:
                await _finish(self._switch("bridge", "none"))
        said = done.output
        if not done.ok and said.lstrip().startswith(
            (b"OCI runtime exec failed", b"Error response from daemon", b"Error: No such container")
        ):
            raise WorkspaceError(
                f"the command could not be started in its container: {done.text.strip()[:2000]}"
            )
        return done

    async def put(self, name: str, content: bytes, *, executable: bool = False) -> None:
        _check_name(name)
        mode = "755" if executable else "644"
        done = await self.run(["sh", "-c", _PUT, "sh", name, mode], timeout=120.0, stdin=content)
        if not done.ok:
            raise WorkspaceError(f"{name} cannot be written: {done.text.strip()[:500]}")

    async def read(self, name: str, *, limit: int = READ_BYTES) -> bytes | None:
        _check_name(name)
        with tempfile.TemporaryDirectory(prefix="spider-read-") as folder:
            file = Path(folder) / "content"
            command = ["sh", "-c", _READ, "sh", name, str(limit)]
            done = await self.run(command, timeout=120.0, stdout=file)
            if done.code == 44:
                return None
            if not done.ok:
                said = done.text.strip()[:500] or "it is no regular file"
                raise WorkspaceError(f"{name} cannot be read: {said}")
            return await asyncio.to_thread(file.read_bytes)

    async def restart(self) -> bool:
        """End every process in the container; its files stay. False where it had ended by itself
        before. The engine does it from outside, since a container that has used up its process ids
        can start nothing, not even ``kill``. Raises WorkspaceError where it cannot be started
        again."""
        killed = await docker("kill", self.name)  # fails where it has ended, which is as good
        await docker("start", self.name, what="a container could not be started again")
        return killed.ok

    async def _busy(self) -> bool:
        done = await docker("top", self.name, "-eo", "pid")
        return not done.ok or len(done.text.splitlines()) - 1 > _IDLE

    async def _switch(self, old: str, new: str) -> None:
        what = f"a container could not be moved from the network {old} to {new}"
        await docker("network", "disconnect", old, self.name, what=what)
        await docker("network", "connect", new, self.name, what=what)


class DockerWorkspace:
    """Containers with the label ``owner``. ``root`` holds the vaults. ``network`` gives containers
    the engine's default network; ``processes`` bounds the processes of each, ``memory_mb`` its
    memory in MiB (None: no bound). ``mounts`` are pairs of a folder of the host and its place in
    the container, read-only. ``pull_timeout`` is in seconds."""

    kind = "docker"

    def __init__(
        self,
        root: Path,
        *,
        owner: str = "spider",
        network: bool = False,
        processes: int = PIDS,
        memory_mb: int | None = None,
        mounts: Sequence[tuple[str, str]] = (),
        pull_timeout: float = 3600.0,
    ) -> None:
        self._root = root
        self._owner = owner
        self._network = network
        self._processes = processes
        self._memory_mb = memory_mb
        self._mounts = tuple(mounts)
        self._pull_timeout = pull_timeout
        self._vaults = f"vault-{owner}-"

    async def check(self) -> None:
        if shutil.which("docker") is None:
            raise EngineUnavailable(
                "workspace: docker needs the docker command on this worker's PATH, and an engine."
                " Without one, workspace: bwrap takes tasks that come as repositories"
            )
        done = await docker("version", "--format", "{{.Server.Version}}")
        if not done.ok:
            said = done.text.strip()[-1000:] or "docker version did not answer"
            raise EngineUnavailable(f"workspace: docker finds no engine: {said}")

    @contextlib.asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[DockerBox]:
        if task.origin.kind != "image":
            raise WorkspaceError(
                f"{task.instance_id} comes as a repository ({task.origin.kind}), not as a container"
                " image: workspace: bwrap opens that"
            )
        image = task.origin.ref
        image_path = await self._image_path(image)
        self._root.mkdir(parents=True, exist_ok=True)
        vault = Path(tempfile.mkdtemp(prefix=self._vaults, dir=self._root))
        name = f"spider-{uuid.uuid4().hex}"
        try:
            what = f"no container of {image} could be started"
            await docker(*self._create(name, image, vault), what=what)
            await docker("start", name, what=what)
            yield DockerBox(name, vault=vault, image_path=image_path, networked=self._network)
        finally:
            await _finish(self._remove(name, vault))

    async def sweep(self) -> int:
        """Remove the containers and vaults of this owner, which a worker that died has left; how
        many containers there were. Not while boxes of the same owner are open."""
        label = f"label={LABEL}={self._owner}"
        done = await docker(
            "ps", "-a", "-q", "--filter", label, what="containers could not be listed"
        )
        names = done.text.split()
        if names:
            await docker("rm", "-f", "-v", *names, what="containers could not be removed")
        for vault in self._root.glob(f"{glob.escape(self._vaults)}*"):
            await asyncio.to_thread(remove_folder, vault)
        return len(names)

    def _create(self, name: str, image: str, vault: Path) -> list[str]:
        options = [
            "create", "--name", name, "--label", f"{LABEL}={self._owner}", "--init",
            "--network", "bridge" if self._network else "none",
            "--pids-limit", str(self._processes),
            "--security-opt", "no-new-privileges",
            "--workdir", TREE, "--entrypoint", "sleep",
        ]  # fmt: skip
        if self._memory_mb is not None:
            options += ["--memory", f"{self._memory_mb}m"]
        for source, target in ((str(vault), VAULT), *self._mounts):
            options += ["--mount", f"type=bind,source={source},target={target},readonly"]
        return [*options, image, "infinity"]

    async def _image_path(self, image: str) -> str:
        """The image's PATH, after having pulled it where it is not here."""
        inspect = ("image", "inspect", "--format", "{{json .Config.Env}}", image)
        done = await docker(*inspect)
        if not done.ok:
            what = f"the image {image} cannot be pulled"
            await docker("pull", "--quiet", image, timeout=self._pull_timeout, what=what)
            done = await docker(*inspect, what=f"the image {image} cannot be read")
        try:
            variables = dict(entry.split("=", 1) for entry in json.loads(done.text) or ())
        except ValueError:
            variables = {}
        return str(variables.get("PATH", _PATH))

    async def _remove(self, name: str, vault: Path) -> None:
        try:
            done = await docker("rm", "-f", "-v", name)
            if not done.ok and b"No such container" not in done.output:
                raise WorkspaceError(f"a container could not be removed: {done.text.strip()[:500]}")
        finally:
            await asyncio.to_thread(remove_folder, vault)


async def _finish(work: Coroutine[Any, Any, object]) -> None:
    """Do it to its end, also while being cancelled: a container would be left otherwise."""
    running = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    running.result()


def _check_name(name: str) -> None:
    if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise WorkspaceError(f"{name!r} is no name within the tree")
