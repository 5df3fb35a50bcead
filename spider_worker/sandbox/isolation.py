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
from spider_worker.confinement import KERNEL_PATHS, disables_userns, interpreter_roots

MODES = ("auto", "bwrap", "namespaces", "process")

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store")
_ETC = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives")
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
    try:
        return Interpreter(executable, interpreter_roots(executable))
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxError(f"the interpreter {executable} does not run: {error}") from error


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
    for path in KERNEL_PATHS:
        if os.path.exists(path):
            prefix += ["--ro-bind", path, path]
    if disables_userns(bwrap):
        prefix.append("--disable-userns")
    for target, link in _system_paths()[0]:
        prefix += ["--symlink", target, link]
    for path in _visible(interpreter):
        prefix += ["--ro-bind", path, path]
    return (*prefix, "--remount-ro", "/", "--chdir", "/tmp", "--")  # noqa: S108


def _namespaces(interpreter: Interpreter) -> tuple[str, ...]:
    text = importlib.resources.files(__package__).joinpath("namespaces.py").read_text()
    layout = {
        "links": _system_paths()[0],
        # Sources are resolved here: an absolute link would lead elsewhere from the new root.
        "paths": [(os.path.realpath(path), path) for path in _visible(interpreter)],
        "tmp_bytes": _TMP_BYTES,
        "kernel": [path for path in KERNEL_PATHS if os.path.exists(path)],
    }
    return (sys.executable, "-I", "-S", "-B", "-c", text, json.dumps(layout), "--")


_PREFIXES = {"bwrap": _bwrap, "namespaces": _namespaces}
