"""Run one command to its end on this host, and leave nothing of it behind."""

from __future__ import annotations

__all__ = ["OUTPUT_BYTES", "Output", "run_command"]

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

from spider_sdk.errors import WorkspaceError
from spider_worker.workspaces.base import Finished
from spider_worker.workspaces.spawner import spawner

#: Bytes of output that are kept; of more, the first and the last half.
OUTPUT_BYTES: Final = 2 << 20
_READ: Final = 1 << 16
#: Seconds in which a killed tree of processes has to be gone. The kernel needs far less.
_PATIENCE: Final = 30.0


class Output:
    """The first and the last bytes of a stream, ``limit`` in all."""

    def __init__(self, limit: int = OUTPUT_BYTES) -> None:
        self._half = limit // 2
        self._head = bytearray()
        self._tail = bytearray()
        self.cut = False

    def add(self, data: bytes) -> None:
        room = self._half - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        # Trimmed now and then, not with every piece: that would copy the tail each time.
        if len(self._tail) > 2 * self._half + _READ:
            self._trim()

    def value(self) -> bytes:
        self._trim()
        gap = b"\n[... output left out ...]\n" if self.cut else b""
        return bytes(self._head) + gap + bytes(self._tail)

    def _trim(self) -> None:
        excess = len(self._tail) - self._half
        if excess > 0:
            del self._tail[:excess]
            self.cut = True


class _Pipe:
    """A pipe that the event loop reads: ``take`` is called with what comes, ``ended`` is resolved
    at its end."""

    def __init__(self, take: Callable[[bytes], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._take = take
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._read, self.write = os.pipe()

    def __enter__(self) -> Self:
        self._loop.add_reader(self._read, self._readable)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.remove_reader(self._read)
        os.close(self._read)

    def _readable(self) -> None:
        if data := os.read(self._read, _READ):
            self._take(data)
            return
        self._loop.remove_reader(self._read)
        if not self.ended.done():
            self.ended.set_result(None)


async def run_command(
    command: Sequence[str],
    *,
    timeout: float,  # noqa: ASYNC109 - it kills, cancelling waits
    stdin: bytes = b"",
    env: Mapping[str, str],
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    stdout: Path | None = None,
    output_bytes: int = OUTPUT_BYTES,
    cgroup: Path | None = None,
) -> Finished:
    """Run ``command`` with exactly ``env``. ``timeout`` is in seconds. With ``stdout`` its standard
    output goes to that file, and what is kept is its standard error. ``cgroup`` is the
    ``cgroup.procs`` of a group to run in (``pids_group``). When this returns, raises or
    is cancelled, every process below has ended.

    Raises WorkspaceError where the command cannot be started, or nobody can say how it ended.
    """
    output, report = Output(output_bytes), bytearray()
    timed_out = False
    with _Pipe(output.add) as said, _Pipe(report.extend) as reported:
        watched, control = os.pipe()
        began = time.monotonic()
        try:
            with contextlib.ExitStack() as copies:
                for descriptor in (said.write, reported.write, watched):
                    copies.callback(os.close, descriptor)
                source = os.memfd_create("stdin")
                copies.callback(os.close, source)
                file = said.write
                if stdout is not None:
                    file = os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                    copies.callback(os.close, file)
                os.write(source, stdin)
                os.lseek(source, 0, os.SEEK_SET)
                spawner().spawn(
                    command,
                    env=env,
                    cwd=cwd,
                    streams=(source, file, said.write),
                    watched=watched,
                    report=reported.write,
                    pass_fds=pass_fds,
                    cgroup=cgroup,
                )
        except (OSError, ValueError) as error:
            os.close(control)
            raise WorkspaceError(f"{command[0]} could not be started: {error}") from error
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(reported.ended)
        except TimeoutError:
            timed_out = True
        finally:
            # Closing it is the order to kill; where the command has ended nobody listens any more.
            os.close(control)
            await _settle(reported, said, report)
        seconds = time.monotonic() - began
    found = json.loads(report)
    if "error" in found:
        raise WorkspaceError(f"the command could not be started: {found['error']}")
    code = None if timed_out else found["status"]
    return Finished(code=code, output=output.value(), seconds=seconds, cut=output.cut)


async def _settle(reported: _Pipe, said: _Pipe, report: bytearray) -> None:
    """Wait for the end of everything, also while being cancelled."""
    waiting = asyncio.create_task(_ended(reported, said, report))
    cancelled: asyncio.CancelledError | None = None
    while not waiting.done():
        try:
            await asyncio.shield(waiting)
        except asyncio.CancelledError as error:
            # The processes are being killed: leaving now would leave some of them behind.
            cancelled = error
        except WorkspaceError:
            break
    waiting.result()
    if cancelled is not None:
        raise cancelled


async def _ended(reported: _Pipe, said: _Pipe, report: bytearray) -> None:
    try:
        async with asyncio.timeout(_PATIENCE):
            await asyncio.shield(reported.ended)
            if not report:
                # Whoever is left of it may have hold of its output.
                raise WorkspaceError("the process that watches over a command was killed")
            await asyncio.shield(said.ended)
    except TimeoutError:
        raise WorkspaceError("processes of a command that was to be killed do not end") from None
