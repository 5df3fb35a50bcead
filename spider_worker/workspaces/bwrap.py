"""Boxes by bubblewrap: a command sees the system, an interpreter and the tree, and nothing else.

It has process ids, a network (none, unless asked for), IPC, a host name and a user of its own. All
that it can write to is the tree, an empty home and ``/tmp``, the latter two in memory and gone with
the command; what a command leaves running ends with its pid namespace. No engine is needed, and
root is not either, where the kernel lets users make namespaces.

The processes of a command are bounded where the kernel lets them be counted (``pids``).

What it does NOT protect against: faults of the kernel; use of memory, disk and process ids in sum,
for which the worker's container or cgroup has to have a limit; with ``network``, everything that
the host's network reaches.
"""

from __future__ import annotations

__all__ = [
    "HOME",
    "TREE",
    "VAULT",
    "BwrapBox",
    "BwrapWorkspace",
    "bwrap_arguments",
    "bwrap_environment",
]

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from spider_sdk.errors import EngineUnavailable, WorkspaceError
from spider_worker.confinement import KERNEL_PATHS, disables_userns
from spider_worker.swe_tasks.base import Task
from spider_worker.workspaces.base import READ_BYTES, Finished
from spider_worker.workspaces.interpreter import interpreter_roots
from spider_worker.workspaces.origin import check_out
from spider_worker.workspaces.pids import PIDS, pids_group
from spider_worker.workspaces.process import run_command
from spider_worker.workspaces.tree import put_file, read_file, remove_folder

#: Where a command finds the tree, as in the images of the public data sets, and its home.
TREE: Final = "/testbed"
HOME: Final = "/home/agent"
VAULT: Final = "/vault"

_SYSTEM: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store")
_ETC: Final = (
    "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives",
    "/etc/localtime", "/etc/mime.types", "/etc/magic", "/etc/ssl/certs", "/etc/ssl/openssl.cnf",
    "/etc/terminfo", "/etc/inputrc", "/etc/debian_version", "/etc/os-release",
    "/etc/protocols", "/etc/services",
)  # fmt: skip
_NETWORK: Final = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/gai.conf")
_USER: Final = "1000"
#: Files that are shown in place of the host's, which name its users.
_NAMES: Final[Mapping[str, str]] = {
    "passwd": f"root:x:0:0:root:/root:/bin/bash\nagent:x:{_USER}:{_USER}::{HOME}:/bin/bash\n",
    "group": f"root:x:0:\nagent:x:{_USER}:\n",
}
_TMP_BYTES: Final = 2 << 30
_PROBE_SECONDS: Final = 20.0
_HELP: Final = (
    "Its operator may install bubblewrap and allow user namespaces (in a container: a seccomp"
    " profile that lets clone, unshare and mount pass), or the job may take workspace: docker"
)


def bwrap_arguments(
    folder: Path,
    *,
    roots: Iterable[str] = (),
    read_only: Iterable[tuple[str, str]] = (),
    writable: Iterable[tuple[str, str]] = (),
    network: bool = False,
    status_fd: int | None = None,
    tmp_bytes: int = _TMP_BYTES,
    boxes: Path | None = None,
    hidden: Iterable[Path] = (),
) -> list[str]:
    """The command line that goes before a command to run it in a box, ``--`` included.

    ``folder`` is a box's, as BwrapWorkspace makes it (``BwrapBox.folder``). ``roots`` are shown
    read-only where they are on the host (an interpreter's: ``interpreter_roots``), ``read_only``
    and ``writable`` are pairs of a path on the host and one in the box. ``tmp_bytes`` bounds
    ``/tmp`` and the home, each. The environment is passed on as it is: give the process
    ``bwrap_environment`` and what it needs. Killing this process ends everything in the box.
    ``hidden`` are folders of the host that are seen empty where they lie under one that is shown.

    ``boxes`` is for a process that shuts others in itself: all of that folder is writable, where
    it is on the host; the tree's place is an empty folder; the network is the host's, and
    further namespaces can be made.
    """
    arguments = [
        "bwrap", "--unshare-user", "--unshare-ipc", "--unshare-uts",
        "--unshare-cgroup-try", "--uid", _USER, "--gid", _USER, "--cap-drop", "ALL",
        "--hostname", "testbed", "--die-with-parent",
        "--size", str(tmp_bytes), "--tmpfs", "/tmp",  # noqa: S108 - the box's own
        "--size", str(tmp_bytes), "--tmpfs", HOME,
        "--dev", "/dev",
    ]  # fmt: skip
    if boxes is not None:
        # One that bubblewrap mounts has parts covered, and then the kernel allows no further one.
        arguments += ["--bind", "/proc", "/proc"]
    else:
        arguments += ["--unshare-pid", "--proc", "/proc"]
        for name in KERNEL_PATHS:
            if os.path.exists(name):
                arguments += ["--ro-bind", name, name]
        if disables_userns("bwrap"):
            # Without one of its own nobody in the box gets at what the kernel checks there.
            arguments.append("--disable-userns")
    if not (network or boxes):
        arguments.append("--unshare-net")
    if status_fd is not None:
        arguments += ["--json-status-fd", str(status_fd)]
    shown = [*_ETC, *(_NETWORK if network or boxes else ())]
    for name in _SYSTEM:
        if os.path.islink(name):
            arguments += ["--symlink", os.readlink(name), name]
        else:
            shown.append(name)
    shown += [root for root in roots if not Path(root).is_relative_to("/usr")]
    for name in sorted({name for name in shown if os.path.exists(name)}):  # parents first
        # A link of /etc may lead to a place that is not there in the box.
        arguments += ["--ro-bind", os.path.realpath(name), name]
    covers = _covers(shown, hidden)
    for place in covers:
        arguments += ["--size", "65536", "--tmpfs", place]
    for name in _NAMES:
        arguments += ["--ro-bind", str(folder / name), f"/etc/{name}"]
    if boxes is None:
        arguments += ["--bind", str(folder / "tree"), TREE]
    else:
        arguments += ["--bind", str(boxes), str(boxes), "--dir", TREE]
    for source, target in read_only:
        arguments += ["--ro-bind", source, target]
    for source, target in writable:
        arguments += ["--bind", source, target]
    for place in covers:
        arguments += ["--remount-ro", place]
    return [*arguments, "--remount-ro", "/", "--chdir", TREE, "--"]


def _covers(shown: Iterable[str], hidden: Iterable[Path]) -> list[str]:
    """Where what is hidden would be seen."""
    folders = {folder.resolve() for folder in hidden if folder.is_dir()}
    places = set()
    for name in shown:
        root = Path(name).resolve()
        for folder in folders:
            if folder != root and folder.is_relative_to(root):
                places.add(str(Path(name) / folder.relative_to(root)))
    # One within another is covered with it.
    return sorted(
        place for place in places
        if not any(place != other and Path(place).is_relative_to(other) for other in places)
    )  # fmt: skip


def write_names(folder: Path) -> None:
    """Put into a box's folder the files that are shown in place of the host's."""
    for name, text in _NAMES.items():
        (folder / name).write_text(text)


def bwrap_environment(python: str) -> dict[str, str]:
    """The environment of every command in a box; ``python``'s folder comes first on the PATH."""
    system = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
    return {
        "PATH": f"{Path(python).parent}:{system}",
        "HOME": HOME,
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "USER": "agent",
    }


class BwrapBox:
    """``folder`` is the host's and holds ``tree`` and ``vault``; ``roots`` is what ``python`` needs
    to see, ``hidden`` what nobody is to see."""

    def __init__(
        self, folder: Path, *, python: str, roots: Sequence[str], hidden: Sequence[Path] = ()
    ) -> None:
        self.folder = folder
        self._hidden = tuple(hidden)
        self.python = python
        self.roots = tuple(roots)
        self._tree = folder / "tree"
        self.vault = folder / "vault"
        self.vault_path = VAULT

    @property
    def path(self) -> str:
        return TREE

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
        with tempfile.TemporaryFile() as status, pids_group("command", PIDS) as cgroup:
            number = status.fileno()
            prefix = bwrap_arguments(
                self.folder,
                roots=self.roots,
                read_only=[(str(self.vault), self.vault_path)],
                network=network,
                status_fd=number,
                hidden=self._hidden,
            )
            whole = bwrap_environment(self.python) | {**(env or {})}
            # bwrap itself is found on the worker's PATH, the command on the box's.
            prefix[0] = shutil.which("bwrap") or prefix[0]
            done = await run_command(
                [*prefix, *command],
                timeout=timeout,
                stdin=stdin,
                env=whole,
                pass_fds=(number,),
                stdout=stdout,
                cgroup=cgroup,
            )
            status.seek(0)
            begun = b'"exit-code"' in status.read()
        # Without it, bwrap's own status could be taken for the command's.
        if done.code == 1 and not begun and done.output.startswith(b"bwrap: "):
            said = done.text.strip()[:2000]
            raise WorkspaceError(f"the command could not be started in its box: {said}")
        return done

    async def put(self, name: str, content: bytes, *, executable: bool = False) -> None:
        await asyncio.to_thread(put_file, self._tree, name, content, executable=executable)

    async def read(self, name: str, *, limit: int = READ_BYTES) -> bytes | None:
        return await asyncio.to_thread(read_file, self._tree, name, limit=limit)


class BwrapWorkspace:
    """Boxes whose trees lie in folders under ``root``, which is made where it is missing.
    ``python`` comes first on the PATH of commands, its environment is shown read-only; None is the
    worker's own. ``allow_private`` lets repositories come from private addresses. ``hidden`` are
    folders of which commands see nothing, ``root`` among them, wherever they lie."""

    kind = "bwrap"

    def __init__(
        self,
        root: Path,
        *,
        python: str | None = None,
        allow_private: bool = False,
        hidden: Sequence[Path] = (),
    ) -> None:
        self._root = root
        self._hidden = (root, *hidden)
        self._allow_private = allow_private
        self._python = python or sys.executable

    async def check(self) -> None:
        """Raise EngineUnavailable where bubblewrap or git is missing, or the kernel forbids what
        it does: found out by running it, since a container may have the program and no leave."""
        for program in ("bwrap", "git"):
            if shutil.which(program) is None:
                raise EngineUnavailable(
                    f"workspace: bwrap needs {program} on this worker's PATH. {_HELP}"
                )
        folder = self._make_folder()
        try:
            (folder / "tree").mkdir()
            box = await self._box(folder)
            command = (self._python, "-I", "-c", "import ctypes, mmap")
            done = await box.run(command, timeout=_PROBE_SECONDS)
        except WorkspaceError as error:
            raise EngineUnavailable(f"bubblewrap: {error.message}. {_HELP}") from error
        finally:
            await asyncio.to_thread(remove_folder, folder)
        if not done.ok:
            said = done.text.strip()[-500:] or f"it ended with {done.code}"
            raise EngineUnavailable(f"{self._python} does not run in a box: {said}")

    @contextlib.asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[BwrapBox]:
        folder = self._make_folder()
        try:
            await check_out(task, folder / "tree", allow_private=self._allow_private)
            yield await self._box(folder)
        finally:
            await asyncio.to_thread(remove_folder, folder)

    async def _box(self, folder: Path) -> BwrapBox:
        roots = await asyncio.to_thread(interpreter_roots, self._python)
        return BwrapBox(folder, python=self._python, roots=roots, hidden=self._hidden)

    def _make_folder(self) -> Path:
        self._root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="box-", dir=self._root))
        (folder / "vault").mkdir()
        write_names(folder)
        return folder
