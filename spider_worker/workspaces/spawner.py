"""This worker's process that runs commands (``warden``), and what it is told of each."""

from __future__ import annotations

__all__ = ["Spawner", "spawner"]

import array
import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from spider_worker.workspaces.warden import SCRIPT


class Spawner:
    """Starts commands, from any thread. The process behind it is started with the first command,
    again when it was lost, and ends with this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def spawn(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path | None,
        streams: tuple[int, int, int],
        watched: int,
        report: int,
        pass_fds: Sequence[int] = (),
        cgroup: Path | None = None,
    ) -> None:
        """Have ``command`` run with exactly ``env``, in ``cwd`` (None: anywhere), on ``streams``
        (input, output, error). It is killed with all that it started when the other end of
        ``watched`` is closed; what became of it is written to ``report``. The descriptors stay the
        caller's to close; ``pass_fds`` have the same numbers there. ``cgroup`` is the
        ``cgroup.procs`` of a group that is to hold the command and what it starts.

        Raises OSError where no process could be started, and ValueError for what no process can
        be given.
        """
        order = {
            "command": list(command),
            "env": dict(env),
            "cwd": None if cwd is None else str(cwd),
            "numbers": list(pass_fds),
            "cgroup": None if cgroup is None else str(cgroup),
        }
        if any("\0" in text for text in (*command, *env, *env.values())):
            raise ValueError("embedded null byte")
        # A command line is longer than a packet may be.
        with os.fdopen(os.memfd_create("order"), "w+b") as file:
            file.write(json.dumps(order).encode())
            file.seek(0)
            descriptors = (file.fileno(), *streams, watched, report, *pass_fds)
            with self._lock:
                try:
                    self._send(descriptors)
                except ConnectionError:
                    self._drop()  # it was killed; nothing that it has not been told is lost
                    self._send(descriptors)

    def close(self) -> None:
        """End the process, and every command with it as soon as its caller has gone. Idempotent."""
        with self._lock:
            self._drop()

    def _send(self, descriptors: Sequence[int]) -> None:
        if self._control is None:
            self._start()
        assert self._control is not None
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        self._control.sendmsg([b"!"], [rights])

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own script
                [sys.executable, "-I", "-S", str(SCRIPT), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._control = ours

    def _drop(self) -> None:
        control, self._control = self._control, None
        process, self._process = self._process, None
        if control is not None:
            control.close()
        if process is not None:
            process.kill()  # also where a process that was forked off this one holds the socket
            process.wait()


@functools.cache
def spawner() -> Spawner:
    """The one of this process."""
    only = Spawner()
    atexit.register(only.close)
    return only
