"""How a sandbox process is kept from the host: bubblewrap, namespaces, or not at all.

``bwrap`` and ``namespaces`` give the process a file system of its own (the system's
libraries and the interpreter, read-only, and an empty ``/tmp``), no network, and its own
process ids; ``process`` leaves it the host's. Whether a mode works is found out by running
it: a container may have the programs and forbid what they do.
"""

from __future__ import annotations

__all__ = ["MODES", "Interpreter", "Launcher", "choose_launcher", "inspect_interpreter"]

import dataclasses
import functools
import importlib.resources
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from spider_sdk.errors import NotSupported, SandboxError

MODES = ("auto", "bwrap", "namespaces", "process")

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store")
_ETC = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives")
#: The kernel lets root's own user write to these without any capability, and the worker may be
#: root: ``core_pattern`` alone would be a way out.
_KERNEL = (
    "/proc/sys", "/proc/fs", "/proc/scsi", "/proc/acpi", "/proc/mtrr", "/proc/sysrq-trigger",
)  # fmt: skip
_TMP_BYTES = 1 << 30
_PROBE_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """A Python and the folders and files that it needs to see."""

    executable: str
    roots: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Launcher:
    """``prefix`` goes before the interpreter's own command line."""

    mode: str
    prefix: tuple[str, ...]

    @property
    def isolated(self) -> bool:
        return self.mode != "process"


@functools.cache
def inspect_interpreter(executable: str) -> Interpreter:
    """Ask an interpreter where it lives. Raises SandboxError where it does not run."""
    question = "import sys, json; print(json.dumps([sys.prefix, sys.base_prefix]))"
    try:
        answer = subprocess.run(  # noqa: S603
            [executable, "-I", "-c", question],
            capture_output=True, check=True, env={}, timeout=_PROBE_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxError(f"the interpreter {executable} does not run: {error}") from error
    prefixes = [prefix for prefix in json.loads(answer.stdout) if prefix != "/"]
    roots = dict.fromkeys(prefixes)
    # A virtual environment's python is a chain of links; each of them has to be there.
    link = Path(executable)
    for _ in range(20):
        if not any(link.is_relative_to(root) for root in roots):
            roots[str(link)] = None
        if not link.is_symlink():
            break
        link = link.parent / link.readlink()
    # The prefix may itself be reached over a link (…/cpython-3.12 -> …/cpython-3.12.4).
    roots.update(dict.fromkeys(os.path.realpath(prefix) for prefix in prefixes))
    return Interpreter(executable, tuple(roots))


@functools.cache
def choose_launcher(mode: str, interpreter: Interpreter) -> Launcher:
    """The launcher for a mode; ``auto`` takes the first that isolates. Blocking: tries it.

    Raises NotSupported where the mode does not work on this host.
    """
    if mode not in MODES:
        raise NotSupported(f"SPIDER_SANDBOX={mode}: expected one of {', '.join(MODES)}")
    if mode == "process":
        return Launcher("process", ())
    reasons = []
    for candidate in ("bwrap", "namespaces") if mode == "auto" else (mode,):
        launcher = Launcher(candidate, _PREFIXES[candidate](interpreter))
        fault = _fault(launcher, interpreter)
        if fault is None:
            return launcher
        reasons.append(f"{candidate}: {fault}")
    raise NotSupported(
        "user functions need isolation from this worker's host, which it does not offer "
        f"({'; '.join(reasons)}). Its operator may install bubblewrap, allow unprivileged user "
        "namespaces (in a container: a seccomp profile that lets clone, unshare and mount pass), "
        "or set SPIDER_SANDBOX=process to run user functions with no isolation from the host"
    )


def _fault(launcher: Launcher, interpreter: Interpreter) -> str | None:
    """Why a launcher does not work here; None if it does."""
    if launcher.mode == "bwrap" and not launcher.prefix[0]:
        return "there is no bwrap on PATH"
    if not sys.platform.startswith("linux"):
        return "only Linux has it"
    command = [*launcher.prefix, interpreter.executable, "-I", "-c", "import ctypes, mmap"]
    try:
        run = subprocess.run(  # noqa: S603
            command, capture_output=True, env={}, timeout=_PROBE_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if run.returncode == 0:
        return None
    said = run.stderr.decode(errors="replace").strip().splitlines()
    return said[-1] if said else f"it ended with status {run.returncode}"


def _system_paths() -> tuple[list[tuple[str, str]], list[str]]:
    """The host's libraries: links to make, as (target, link), and paths to show."""
    links, shown = [], []
    for name in _SYSTEM:
        if os.path.islink(name):
            links.append((os.readlink(name), name))
        elif os.path.isdir(name):
            shown.append(name)
    return links, shown + [name for name in _ETC if os.path.exists(name)]


def _visible(interpreter: Interpreter) -> list[str]:
    """What is shown read-only: parents before children, nothing under /usr twice."""
    _, shown = _system_paths()
    shown += [root for root in interpreter.roots if not Path(root).is_relative_to("/usr")]
    return sorted(dict.fromkeys(shown))


def _bwrap(interpreter: Interpreter) -> tuple[str, ...]:
    bwrap = shutil.which("bwrap") or ""
    prefix = [
        bwrap, "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534",
        "--hostname", "sandbox", "--die-with-parent",
        "--size", str(_TMP_BYTES), "--tmpfs", "/tmp",  # noqa: S108 - the sandbox's own
        "--proc", "/proc", "--dev", "/dev",
    ]  # fmt: skip
    for path in _KERNEL:
        if os.path.exists(path):
            prefix += ["--ro-bind", path, path]
    if _disables_userns(bwrap):
        prefix.append("--disable-userns")
    for target, link in _system_paths()[0]:
        prefix += ["--symlink", target, link]
    for path in _visible(interpreter):
        prefix += ["--ro-bind", path, path]
    return (*prefix, "--remount-ro", "/", "--chdir", "/tmp", "--")  # noqa: S108


@functools.cache
def _disables_userns(bwrap: str) -> bool:
    """Whether this bubblewrap can forbid further user namespaces (from 0.8 on), in which a process
    would have capabilities again."""
    try:
        said = subprocess.run(  # noqa: S603
            [bwrap, "--help"], capture_output=True, timeout=_PROBE_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return b"--disable-userns" in said.stdout + said.stderr


def _namespaces(interpreter: Interpreter) -> tuple[str, ...]:
    text = importlib.resources.files(__package__).joinpath("namespaces.py").read_text()
    layout = {
        "links": _system_paths()[0],
        # Sources are resolved here: an absolute link would lead elsewhere from the new root.
        "paths": [(os.path.realpath(path), path) for path in _visible(interpreter)],
        "tmp_bytes": _TMP_BYTES,
        "kernel": [path for path in _KERNEL if os.path.exists(path)],
    }
    return (sys.executable, "-I", "-S", "-B", "-c", text, json.dumps(layout), "--")


_PREFIXES = {"bwrap": _bwrap, "namespaces": _namespaces}
