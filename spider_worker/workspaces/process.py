"""Run one command to its end on this host, and leave nothing of it behind."""

from __future__ import annotations

__all__ = ["OUTPUT_BYTES", "Output", "run_command"]

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from spider_sdk.errors import WorkspaceError
from spider_worker.workspaces.base import Finished
from spider_worker.workspaces.supervisor import SCRIPT

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
) -> Finished:
    """Run ``command`` with exactly ``env``. ``timeout`` is in seconds, counted from the start of
    the process. With ``stdout`` its standard output goes to that file, and what is kept is its
    standard error. When this returns, raises or is cancelled, every process below has ended.

    Raises WorkspaceError where the command cannot be started.
    """
    control_read, control = os.pipe()
    report, report_write = os.pipe()
    began = time.monotonic()
    inherited = (control_read, report_write, *pass_fds)
    pipe = asyncio.subprocess.PIPE
    file = None
    try:
        file = None if stdout is None else os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", str(SCRIPT), str(control_read), str(report_write), *command,
            stdin=pipe,
            stdout=pipe if file is None else file,
            stderr=asyncio.subprocess.STDOUT if file is None else pipe,
            env=dict(env),
            cwd=cwd,
            pass_fds=inherited,
            start_new_session=True,
        )  # fmt: skip
    except BaseException as error:
        os.close(control)
        os.close(report)
        if isinstance(error, OSError | ValueError):
            raise WorkspaceError(f"{command[0]} could not be started: {error}") from error
        raise
    finally:
        if file is not None:
            os.close(file)
        os.close(control_read)
        os.close(report_write)
    output = Output(output_bytes)
    exchange = asyncio.create_task(_exchange(process, stdin, output))
    timed_out = False
    try:
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(exchange)
        except TimeoutError:
            timed_out = True
    finally:
        # Closing it is the order to kill; where the command has ended nobody listens any more.
        os.close(control)
        why = await _settle(process, exchange, report)
    seconds = time.monotonic() - began
    if why:
        raise WorkspaceError(f"the command could not be started: {why}")
    code = None if timed_out else process.returncode
    return Finished(code=code, output=output.value(), seconds=seconds, cut=output.cut)


async def _exchange(process: asyncio.subprocess.Process, stdin: bytes, output: Output) -> None:
    async def write() -> None:
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it need not read what it is given
            process.stdin.write(stdin)
            await process.stdin.drain()
        process.stdin.close()
        with contextlib.suppress(ConnectionError):
            await process.stdin.wait_closed()

    async def read() -> None:
        stream = process.stdout or process.stderr
        assert stream is not None
        while data := await stream.read(_READ):
            output.add(data)

    await asyncio.gather(write(), read(), process.wait())


async def _settle(
    process: asyncio.subprocess.Process, exchange: asyncio.Task[None], report: int
) -> str:
    """Wait for the end of everything, also while being cancelled; why it could not be started."""
    waiting = asyncio.create_task(_ended(process, exchange))
    cancelled: asyncio.CancelledError | None = None
    try:
        while not waiting.done():
            try:
                await asyncio.shield(waiting)
            except asyncio.CancelledError as error:
                # The processes are being killed: leaving now would leave some of them behind.
                cancelled = error
        waiting.result()
        said = os.read(report, _READ)
    finally:
        os.close(report)
    if cancelled is not None:
        raise cancelled
    return said.decode(errors="replace")


async def _ended(process: asyncio.subprocess.Process, exchange: asyncio.Task[None]) -> None:
    try:
        async with asyncio.timeout(_PATIENCE):
            await exchange
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        raise WorkspaceError("processes of a command that was to be killed do not end") from None
