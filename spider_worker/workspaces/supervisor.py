"""A command's parent, which ends when nothing that the command started is alive any more.

Run as a script, in a process of its own: ``supervisor.py CONTROL_FD REPORT_FD COMMAND …``. As a
child subreaper it is handed every orphan below it, also one that forked twice and made a session
of its own, so killing until no child is left kills everything. It does so when the command ends,
and when the other end of the control pipe is closed: by whoever gave up waiting, or by the kernel
because the worker died. Its own status is the command's, 128 + N for signal N; where the command
could not be started it writes why to the report pipe.

What gets away: a process that kills this one first. A box with a pid namespace of its own has no
sight of it; under ``local`` the same user can.
"""

from __future__ import annotations

__all__ = ["SCRIPT", "main"]

import contextlib
import ctypes
import os
import select
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

SCRIPT: Final = Path(__file__)
_PR_SET_CHILD_SUBREAPER: Final = 36
_CANNOT_START: Final = 127


def main(arguments: Sequence[str]) -> int:
    control, report, command = int(arguments[0]), int(arguments[1]), list(arguments[2:])
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        os.write(report, f"prctl: {os.strerror(ctypes.get_errno())}".encode())
        return _CANNOT_START
    pid = os.fork()
    if pid == 0:
        os.set_inheritable(control, False)
        _become(command, report)
    os.close(report)
    # The command's only: a reader waits for the end of these.
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    handle = os.pidfd_open(pid)
    ready, _, _ = select.select([handle, control], [], [])
    status = os.waitpid(pid, 0)[1] if handle in ready else None
    _kill_all()
    return _CANNOT_START if status is None else _shell_status(status)


def _become(command: list[str], report: int) -> None:
    os.set_inheritable(report, False)
    # Python ignores it, and a program that inherits that writes on into a closed pipe.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        os.write(report, f"{command[0]}: {error.strerror}".encode())
        os._exit(_CANNOT_START)


def _shell_status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def _kill_all() -> None:
    """Stop first, kill then: what is stopped does not fork while the others are looked for."""
    while True:
        stopped: set[int] = set()
        while fresh := _descendants(os.getpid()) - stopped:
            _signal(fresh, signal.SIGSTOP)
            stopped |= fresh
        _signal(stopped, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _descendants(root: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (parent := _parent(name)) is not None:
            children.setdefault(parent, []).append(int(name))
    found: set[int] = set()
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found.update(below)
        queue += below
    return found


def _parent(pid: str) -> int | None:
    """None for a process that has ended: a zombie has no need to be killed, and no child."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name, in parentheses, may itself hold spaces and parentheses.
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
