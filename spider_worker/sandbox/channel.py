"""One live sandbox process and the socket to it: start, exchange rows, kill."""

from __future__ import annotations

__all__ = ["Channel", "Exchange", "Setup"]

import asyncio
import contextlib
import dataclasses
import importlib.resources
import mmap
import os
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from spider_sdk.errors import FatalJobError, SandboxError
from spider_worker.sandbox.isolation import Launcher

_COMPILE = "import sys; exec(compile(sys.argv.pop(), '<spider sandbox>', 'exec'))"
_READ_BYTES = 1 << 18
_LOG_BYTES = 64 << 10
_ANSWER_BYTES = 33 << 20  # more than child.py ever writes on a line
_EXIT_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a process is told first. ``limits`` are names and values of RLIMIT_*."""

    name: str
    source: str
    kwargs: Mapping[str, Any]
    stage: str
    env: Mapping[str, str]
    limits: Mapping[str, int]
    row_timeout: float

    def with_limit(self, name: str, value: int) -> Setup:
        return dataclasses.replace(self, limits={**self.limits, name: value})


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What came back for a chunk: ``answers`` for its first rows, and, where that is not
    all of them, why (``timeout``, ``died``, or ``garbled`` where the process wrote what is no
    answer) and how many rows had been begun."""

    answers: list[list[Any]]
    begun: int
    failure: str | None = None


class Channel:
    """A running process. Made by ``open``; of no use after ``kill`` or a failed exchange."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        counter: mmap.mmap,
        log: _Log,
    ) -> None:
        self._process = process
        self._reader, self._writer = streams
        self._counter = counter
        self._log = log

    @classmethod
    async def open(
        cls,
        launcher: Launcher,
        python: str,
        setup: Setup,
        *,
        patience: float,
        on_output: Callable[[str], None],
    ) -> Channel:
        """Start a process and define the function in it, within ``patience`` seconds.

        It is started from the event loop's own thread, because it dies with the thread that
        started it (PR_SET_PDEATHSIG counts threads); that takes a few milliseconds.
        Raises SandboxError, FatalJobError.
        """
        channel = await cls._spawn(launcher, python, on_output)
        try:
            await channel._define(launcher, setup, patience)
        except BaseException:
            await channel.kill()
            raise
        return channel

    @classmethod
    async def _spawn(
        cls, launcher: Launcher, python: str, on_output: Callable[[str], None]
    ) -> Channel:
        text = importlib.resources.files(__package__).joinpath("child.py").read_text()
        ours, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as shared:
            shared.truncate(8)
            fd = shared.fileno()
            command = [*launcher.prefix, python, "-I", "-B", "-X", "utf8", "-c", _COMPILE]
            try:
                process = subprocess.Popen(  # noqa: ASYNC220, S603 - see open()
                    [*command, str(fd), text],
                    stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.PIPE,
                    pass_fds=(fd,), env={}, cwd="/", start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                ours.close()
                raise SandboxError(f"the sandbox process cannot be started: {error}") from error
            counter = mmap.mmap(fd, 8)
        streams = await asyncio.open_unix_connection(sock=ours, limit=_READ_BYTES * 4)
        log = await _Log.open(process, on_output)
        return cls(process, streams, counter, log)

    async def _define(self, launcher: Launcher, setup: Setup, patience: float) -> None:
        document = dataclasses.asdict(setup)
        # Only without a namespace of its own does the process see our process id.
        document["parent"] = None if launcher.isolated else os.getpid()
        self._writer.write(orjson.dumps(document) + b"\n")
        try:
            async with asyncio.timeout(patience):
                line = await self._reader.readline()
        except TimeoutError:
            raise FatalJobError(
                f"{setup.stage}: defining {setup.name} took more than {patience:g} s"
            ) from None
        except (ValueError, ConnectionError) as error:
            raise SandboxError(f"{setup.stage}: the sandbox answered no setup: {error}") from error
        if not line.endswith(b"\n"):
            how = await self.ending()
            said = self._log.tail[-2_000:]
            raise SandboxError(f"{setup.stage}: the sandbox process {how} while it started: {said}")
        match orjson.loads(line):
            case ["ready"]:
                return
            case ["failed", str(message), str(trace)]:
                raise FatalJobError(_definition_fault(setup, message, trace))
        raise SandboxError(f"{setup.stage}: the sandbox's first line is no answer to the setup")

    async def exchange(self, lines: Sequence[bytes], row_timeout: float) -> Exchange:
        """Have a chunk of rows run. A failed exchange leaves the channel to be killed.

        A row has timed out when the number of rows begun has not moved for
        ``row_timeout`` seconds; the sum over the chunk is bounded too, for user code could
        write that number.
        """
        before = self._begun()
        with contextlib.suppress(ConnectionError):  # it died meanwhile: reading says so
            self._writer.write(b"%d\n%b\n" % (len(lines), b"\n".join(lines)))
        answers: list[list[Any]] = []
        rest = b""
        watch = _Watch(row_timeout, len(lines))
        while len(answers) < len(lines):
            try:
                async with asyncio.timeout(watch.interval):
                    data = await self._reader.read(_READ_BYTES)
            except TimeoutError:
                if self._process.poll() is not None:
                    # Something it started holds the socket open: no end of file will come.
                    return Exchange(answers, self._clamped(before, answers, lines), "died")
                if watch.expired(self._begun()):
                    return Exchange(answers, self._clamped(before, answers, lines), "timeout")
                continue
            except ConnectionError:
                data = b""
            if not data:
                return Exchange(answers, self._clamped(before, answers, lines), "died")
            *whole, rest = (rest + data).split(b"\n")
            try:
                answers += [_checked_answer(line) for line in whole]
            except ValueError:
                return Exchange(answers, self._clamped(before, answers, lines), "garbled")
            if len(answers) > len(lines) or len(rest) > _ANSWER_BYTES:
                del answers[len(lines) :]
                return Exchange(answers, self._clamped(before, answers, lines), "garbled")
        return Exchange(answers, len(lines))

    def _begun(self) -> int:
        return int(struct.unpack_from("<Q", self._counter, 0)[0])

    def _clamped(self, before: int, answers: Sequence[Any], lines: Sequence[bytes]) -> int:
        return max(len(answers), min(self._begun() - before, len(lines)))

    async def ending(self) -> str:
        """How the process ended, for a message: ``was killed by SIGSEGV``."""
        try:
            code = await asyncio.to_thread(self._process.wait, _EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its channel"
        number = -code if code < 0 else code - 128  # bwrap passes a signal on as 128 and more
        if number > 0 and number in signal.valid_signals():
            name = signal.Signals(number).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return f"was killed by {name}{hint}"
        return f"exited with status {code}"

    async def kill(self) -> None:
        """End the process, its session and what hangs on them. Idempotent.

        SIGKILL at once: there is no state to save, and user code could catch anything
        else. The group takes children along; with a process namespace, whatever is left
        dies with the namespace's first process.
        """
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.poll() is None:
            await asyncio.to_thread(self._process.wait)
        self._log.close()
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        self._counter.close()


class _Watch:
    """Counts the time without progress, by ticks at which our own loop was awake: a stall
    of the worker itself is not the row's fault."""

    def __init__(self, row_timeout: float, rows: int) -> None:
        self.interval = max(0.01, min(0.25, row_timeout / 4))
        self._row_timeout = row_timeout
        self._left = row_timeout * (rows + 1)
        self._still = 0.0
        self._seen = -1
        self._last = time.monotonic()

    def expired(self, begun: int) -> bool:
        now = time.monotonic()
        tick = min(now - self._last, 2 * self.interval)
        self._last = now
        self._left -= tick
        self._still = 0.0 if begun != self._seen else self._still + tick
        self._seen = begun
        return self._still >= self._row_timeout or self._left <= 0


class _Log(asyncio.Protocol):
    """The process's standard output and error: handed on, and the end of it kept."""

    def __init__(self, on_output: Callable[[str], None]) -> None:
        self._kept = bytearray()
        self._on_output = on_output
        self._transport: asyncio.ReadTransport | None = None

    @classmethod
    async def open(cls, process: subprocess.Popen[bytes], on_output: Callable[[str], None]) -> _Log:
        loop = asyncio.get_running_loop()
        transport, log = await loop.connect_read_pipe(lambda: cls(on_output), process.stderr)
        log._transport = transport
        return log

    def data_received(self, data: bytes) -> None:
        self._kept += data
        del self._kept[:-_LOG_BYTES]
        self._on_output(data.decode(errors="replace"))

    @property
    def tail(self) -> str:
        return self._kept.decode(errors="replace")

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def _checked_answer(line: bytes) -> list[Any]:
    """An answer as ``child.py`` writes it. Raises ValueError: user code can find the socket."""
    match orjson.loads(line):
        case [0, value]:
            return [0, value]
        case [1, str(kind), str(message), (str() | None) as trace]:
            return [1, kind, message, trace]
    raise ValueError("no answer")


def _definition_fault(setup: Setup, message: str, trace: str | None) -> str:
    hint = ""
    if message.startswith("ModuleNotFoundError"):
        hint = " (name the package that provides it under job.runtime.packages)"
    return f"{setup.stage}: {setup.name} cannot be defined: {message}{hint}\n{trace or ''}".rstrip()
