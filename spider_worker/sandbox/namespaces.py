"""Runs a command in namespaces of its own, where bubblewrap is not installed.

Like ``child.py`` this text is handed to ``python -I -c`` and uses the standard library
alone: the process must be single-threaded and fresh, which the worker is not. Arguments: a
JSON layout (``paths``: ``[source, place]`` shown read-only; ``links``: ``[target, place]``;
``tmp_bytes``; ``kernel``: places of ``/proc`` to make read-only), ``--``, the command. Needs Linux
5.12 (mount_setattr).
"""

from __future__ import annotations

__all__ = ["main"]

import ctypes
import json
import os
import signal
import stat
import struct
import sys
from typing import Any

CLONE_ALL = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID = 1, 2
SYS_MOUNT_SETATTR = 442
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}
PR_SET_PDEATHSIG = 1
NOBODY = 65534
DEVICES = ("null", "zero", "full", "random", "urandom")

LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    layout, command = json.loads(sys.argv[1]), sys.argv[3:]
    die_with_parent()
    uid, gid = os.getuid(), os.getgid()
    check(LIBC.unshare(CLONE_ALL), "unshare")
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
    write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
    # Only a child is in the new process namespace, as its first process; when that one
    # ends, the kernel kills whatever else is in there.
    if first := os.fork():
        os._exit(exit_status(os.waitpid(first, 0)[1]))
    die_with_parent()
    build_root(layout)
    # The first process of a namespace ignores signals that it has no handler for: the
    # command has to be the second, or a limit on processor time would not end it.
    if second := os.fork():
        while True:
            pid, status = os.wait()
            if pid == second:
                os._exit(exit_status(status))
    # As another user than root, exec drops every capability that the namespace gave.
    os.execve(command[0], command, {})  # noqa: S606 - no shell is meant


def build_root(layout: dict[str, Any]) -> None:
    """Make a root that holds the layout and nothing else, and move into it.

    The new root is made under a tmpfs on /tmp, seen from inside that tmpfs: so paths of the
    host that lie in /tmp themselves can still be bound, from under /old.
    """
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")  # noqa: S108
    os.mkdir("/tmp/old")  # noqa: S108
    pivot("/tmp", "/tmp/old")  # noqa: S108
    os.mkdir("/new")
    mount("tmpfs", "/new", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    os.mkdir("/new/tmp")  # before what may have to be shown below it
    options = f"mode=1777,size={layout['tmp_bytes']}"
    mount("tmpfs", "/new/tmp", "tmpfs", MS_NOSUID | MS_NODEV, options)
    for source, place in layout["paths"]:
        bind("/old" + source, "/new" + place)
        read_only("/new" + place, AT_RECURSIVE)
    for target, place in layout["links"]:
        os.symlink(target, "/new" + place)
    build_dev()
    os.mkdir("/new/proc")
    mount("proc", "/new/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    # In a further user namespace a process would have capabilities again.
    write("/new/proc/sys/user/max_user_namespaces", "0")
    for place in layout["kernel"]:
        mount("/new" + place, "/new" + place, None, MS_BIND | MS_REC)
        read_only("/new" + place, AT_RECURSIVE)
    os.chdir("/new")
    pivot(".", ".")  # stacks the old root on the new one …
    check(LIBC.umount2(b".", MNT_DETACH), "umount2 of the old root")  # … and takes it away
    os.chdir("/")
    read_only("/", 0)
    os.chdir("/tmp")  # noqa: S108


def build_dev() -> None:
    os.mkdir("/new/dev")
    for name in DEVICES:
        bind(f"/old/dev/{name}", f"/new/dev/{name}")
    os.mkdir("/new/dev/shm")
    mount("tmpfs", "/new/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=64m")
    os.symlink("/proc/self/fd", "/new/dev/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"/new/dev/{name}")


def bind(source: str, place: str) -> None:
    if stat.S_ISDIR(os.stat(source).st_mode):
        os.makedirs(place, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "a"):
            pass
    mount(source, place, None, MS_BIND | MS_REC)


def mount(
    source: str | None, place: str, kind: str | None, flags: int, data: str | None = None
) -> None:
    texts = [None if text is None else text.encode() for text in (source, place, kind, data)]
    result = LIBC.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    check(result, f"mount of {source} on {place}")


def read_only(place: str, flags: int) -> None:
    attributes = struct.pack("=4Q", ATTR_RDONLY | ATTR_NOSUID, 0, 0, 0)
    number = ctypes.c_long(SYS_MOUNT_SETATTR)
    size = ctypes.c_size_t(len(attributes))
    result = LIBC.syscall(number, AT_FDCWD, place.encode(), flags, attributes, size)
    check(result, f"mount_setattr of {place}")


def pivot(new: str, old: str) -> None:
    number = SYS_PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise SystemExit(f"pivot_root is not known on {os.uname().machine}")
    check(LIBC.syscall(ctypes.c_long(number), new.encode(), old.encode()), f"pivot_root to {new}")
    os.chdir("/" if new != "." else ".")


def die_with_parent() -> None:
    check(LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def exit_status(status: int) -> int:
    """A shell's convention, as bwrap has it: a signal is 128 and its number."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise SystemExit(f"{what}: {os.strerror(number)}")


def write(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}") from None


if __name__ == "__main__":
    main()
