"""A process shuts itself in: namespaces of its own, one folder to write to, no network, no
capabilities.

For a process that was forked from one that has imported everything, and so cannot be started
through bubblewrap, which executes a program anew. The zygote itself runs under bubblewrap, which
has made the file system read-only; here follows what differs between episodes. Linux only.
"""

from __future__ import annotations

__all__ = ["Plan", "be_warden", "close_memory", "die_with_parent", "enter", "furnish", "kill_all"]

import contextlib
import ctypes
import dataclasses
import fcntl
import os
import signal
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_NEWNS, _NEWUTS, _NEWIPC = 0x00020000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_CHILD_SUBREAPER, _SET_NO_NEW_PRIVS = 1, 4, 36, 38
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_CAPABILITY_VERSION_3 = 0x20080522
_REMOUNT, _RDONLY = 32, 1
_USER: Final = 1000
#: The worker may be root, and root's own user writes to these without any capability.
_KERNEL: Final = (
    "/proc/sys", "/proc/fs", "/proc/scsi", "/proc/acpi", "/proc/mtrr", "/proc/sysrq-trigger",
)  # fmt: skip

_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass(frozen=True)
class Plan:
    """``tree`` is shown at ``path``, and of ``boxes``, the folder with all trees, nothing else is
    seen. ``home`` and ``/tmp`` are empty and in memory, of ``tmp_bytes`` each. ``network`` leaves
    the worker's own network; else there is a loopback alone. ``kept`` are folders under ``/tmp``
    that are seen there all the same (an interpreter's); ``aside`` an empty one to keep them in."""

    tree: str
    path: str
    boxes: str
    home: str
    network: bool = False
    tmp_bytes: int = 4 << 30
    kept: Sequence[str] = ()
    aside: str = ""


def enter(plan: Plan) -> None:
    """Move into namespaces of our own; processes forked afterwards are in them, the first as the
    one whose end ends all. Raises OSError."""
    uid, gid = os.getuid(), os.getgid()
    flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWUSER | _NEWPID
    _check(_LIBC.unshare(flags if plan.network else flags | _NEWNET), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{_USER} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{_USER} {gid} 1")
    if not plan.network:
        _loopback()


def furnish(plan: Plan) -> None:
    """Lay out what is seen; to be called in the new process namespace, whose ``/proc`` it is.
    Gives up every capability afterwards. Raises OSError."""
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount(plan.tree, plan.path, None, _BIND | _REC)
    _mount("tmpfs", plan.boxes, "tmpfs", _NOSUID | _NODEV, "mode=755,size=4k,ro")
    size = f"mode=1777,size={plan.tmp_bytes}"
    if plan.kept:
        _mount("/tmp", plan.aside, None, _BIND | _REC)  # noqa: S108 - the outer one's
    for place in ("/tmp", plan.home):  # noqa: S108 - the episode's own
        _mount("tmpfs", place, "tmpfs", _NOSUID | _NODEV, size)
    for folder in plan.kept:
        os.makedirs(folder, exist_ok=True)
        _mount(plan.aside + folder.removeprefix("/tmp"), folder, None, _BIND | _REC)  # noqa: S108
    if plan.kept:
        _mount("tmpfs", plan.aside, "tmpfs", _NOSUID | _NODEV, "mode=755,size=4k,ro")
    _mount("proc", "/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    # In a further user namespace a process would have capabilities again.
    Path("/proc/sys/user/max_user_namespaces").write_text("0")
    for place in _KERNEL:
        if os.path.exists(place):
            _mount(place, place, None, _BIND | _REC)
            _mount(None, place, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV | _NOEXEC)
    _check(_LIBC.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _check(_LIBC.capset(header, bytes(24)), "capset")


def close_memory() -> None:
    """Let no other process of our user read this one's memory, environment or descriptors: what
    an agent's commands may do must not lead to its key. What is executed later is open again."""
    _check(_LIBC.prctl(_SET_DUMPABLE, 0, 0, 0, 0), "prctl")


def be_warden() -> None:
    """Inherit what our descendants leave behind, and be told to end when the process that started
    us does."""
    _check(_LIBC.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")
    die_with_parent(signal.SIGTERM)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    _check(_LIBC.prctl(_SET_PDEATHSIG, number, 0, 0, 0), "prctl")


def kill_all(seconds: float = 5.0) -> None:
    """Kill every descendant of this process, which is a warden, until there is none.

    A process that forks as fast as it can is met by stopping what is found before it is killed:
    what is stopped does not fork.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = _descendants()
        if not found:
            return
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in found:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _descendants() -> list[int]:
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError):
                stat = Path(f"/proc/{entry}/stat").read_text()
                state, parent = stat[stat.rindex(")") + 2 :].split()[:2]
                if state != "Z":
                    parents.setdefault(int(parent), []).append(int(entry))
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def _loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(probe, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def _mount(
    source: str | None, place: str, kind: str | None, flags: int, data: str | None = None
) -> None:
    texts = [None if text is None else text.encode() for text in (source, place, kind, data)]
    result = _LIBC.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    _check(result, f"mount of {source} on {place}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
