"""A process that runs commands, each under a *warden*: a parent that ends when nothing that the
command started is alive any more.

Run as a script, ``warden.py FD``, once in a worker's life, since starting an interpreter for each
command costs more than most commands. Over the socket ``FD`` (SOCK_SEQPACKET) comes a packet for
each command, of descriptors: a file with the order (``spawner``), its standard input, output and
error, a pipe to watch, one to report to, and what else it is to have. A fork does the rest.

As a child subreaper a warden is handed every orphan below it, also one that forked twice and made
a session of its own, so killing until no child is left kills everything. It does so when the
command ends, and when the other end of the pipe that it watches is closed: by whoever gave up
waiting, or by the kernel because the worker died. Then it reports, in JSON, ``{"status": n}``, the
command's own or 128 + N for signal N, or ``{"error": …}`` where it could not be started.

What gets away: a process that kills its warden first. A box with a pid namespace of its own has no
sight of it; under ``local`` the same user can, and then there is no report.
"""

from __future__ import annotations

__all__ = ["SCRIPT", "main"]

import array
import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

SCRIPT: Final = Path(__file__)
_PR_SET_CHILD_SUBREAPER: Final = 36
_CANNOT_START: Final = 127
_DESCRIPTORS: Final = 250  # the kernel's limit for a packet is 253

_LIBC = ctypes.CDLL(None, use_errno=True)


def main(arguments: Sequence[str]) -> int:
    """Serve until the socket's other end is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # wardens that have ended leave no trace
    with socket.socket(fileno=int(arguments[0])) as control:
        while True:
            data, ancillary, _, _ = control.recvmsg(
                1, socket.CMSG_SPACE(4 * _DESCRIPTORS), socket.MSG_CMSG_CLOEXEC
            )
            if not data:
                return 0
            descriptors = array.array("i")
            for _, _, content in ancillary:
                descriptors.frombytes(content)
            _fork(control, list(descriptors))
            for descriptor in descriptors:
                os.close(descriptor)


def _fork(control: socket.socket, descriptors: list[int]) -> None:
    report = descriptors[5]
    try:
        if os.fork() != 0:
            return
    except OSError as error:
        _say(report, error=f"fork: {error.strerror}")
        return
    try:  # never returns, whatever happens: the loop above is another process's
        control.close()
        _guard(descriptors)
    except BaseException as error:  # noqa: BLE001 - said, and then the process ends
        _say(report, error=repr(error))
    finally:
        os._exit(0)


def _guard(descriptors: list[int]) -> None:
    order, stdin, stdout, stderr, watched, report, *more = descriptors
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    with os.fdopen(order, "rb") as file:
        request = json.loads(file.read())
    failed, failure = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become(request, (stdin, stdout, stderr), more, failure)
    os.close(failure)
    # The command's only: a reader waits for the end of these.
    for descriptor in (stdin, stdout, stderr, *more):
        os.close(descriptor)
    handle = os.pidfd_open(pid)
    ready, _, _ = select.select([handle, watched], [], [])
    status = os.waitpid(pid, 0)[1] if handle in ready else None
    _kill_all()
    if said := os.read(failed, 1 << 12):
        _say(report, error=said.decode(errors="replace"))
    else:
        _say(report, status=_CANNOT_START if status is None else _shell_status(status))


def _become(
    request: dict[str, Any], streams: Sequence[int], more: Sequence[int], failure: int
) -> NoReturn:
    command: list[str] = request["command"]
    wanted = (0, 1, 2, *request["numbers"])
    free = max(wanted) + 1
    what = command[0]
    try:
        # Away from the numbers that are wanted, before the first of them is taken.
        failure = fcntl.fcntl(failure, fcntl.F_DUPFD_CLOEXEC, free)
        moved = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, free) for one in (*streams, *more)]
        for one, number in zip(moved, wanted, strict=True):
            os.dup2(one, number, inheritable=True)
        if request["cgroup"] is not None:
            what = request["cgroup"]
            Path(what).write_bytes(b"0")  # this process; its warden, which has to fork, stays out
        if request["cwd"] is not None:
            what = request["cwd"]
            os.chdir(what)
        what = command[0]
        # Python ignores it, and a program that inherits that writes on into a closed pipe.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.execvpe(command[0], command, request["env"])  # noqa: S606
    except BaseException as error:  # noqa: BLE001 - said, and then the process ends
        why = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
        os.write(failure, f"{what}: {why}".encode(errors="backslashreplace"))
    finally:
        os._exit(_CANNOT_START)


def _say(report: int, **fields: int | str) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(report, json.dumps(fields).encode())


def _shell_status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def _kill_all() -> None:
    """Stop first, kill then: what is stopped does not fork while the others are looked for."""
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not _has_children():
            return
        stopped: set[int] = set()
        while fresh := _descendants(os.getpid()) - stopped:
            _signal(fresh, signal.SIGSTOP)
            stopped |= fresh
        _signal(stopped, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _has_children() -> bool:
    """Also of those that are no zombies yet; far cheaper than looking through all processes."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


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
