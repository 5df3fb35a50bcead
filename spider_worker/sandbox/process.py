"""``ProcessSandbox``: a user's function in a process of its own, restarted when it breaks.

What it protects against: a function that raises, hangs, exits, crashes or eats memory costs
the row that did it. The process has no environment but ``env``, no privilege to gain, limits
on memory, file size, open files and processor time, and dies with the worker. Under ``bwrap``
and ``namespaces`` it has besides no network, no view of the host's files but the system's
libraries and its interpreter (all read-only), none of other processes, an empty ``/tmp`` of
its own, and a bound on the number of processes.

What it does NOT protect against:

- In mode ``process``: anything that the worker's own user may do. The function can read the
  worker's files and environment, use the network, leave processes behind by moving them to a
  session of their own, and change the cached environments that other jobs use.
- Faults of the kernel, side channels between processes of one machine, and the accelerators'
  drivers (no device is shown to it; in mode ``process`` it could open them).
- Use of resources in sum: each process it starts has the memory limit to itself, and the
  files in ``/tmp`` are memory of the host's. The kernel exempts a worker that runs as root
  from the bound on processes. Set limits on the worker's container or cgroup.
- One row influencing the next: rows share the interpreter, so a function that keeps state
  sees its own, and a thread left behind by one row may end the process under another.
- What is in the data: a value returned is checked to be JSON and not to be true.
- Reading the packages installed in the interpreter's environment; no secret belongs there.
"""

from __future__ import annotations

__all__ = ["ProcessSandbox"]

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import orjson

from spider_sdk.errors import RowError, SandboxError
from spider_worker.sandbox.base import Outcome
from spider_worker.sandbox.channel import Channel, Setup
from spider_worker.sandbox.isolation import choose_launcher, inspect_interpreter

_CHUNK_ROWS = 512
_CHUNK_BYTES = 1 << 20
_RESTARTS_WITHOUT_A_ROW = 3
_OPEN_FILES = 256
_HOW = {"timeout": "hung", "garbled": "wrote to the sandbox's own channel"}
_FILE_BYTES = 256 << 20

_logger = logging.getLogger(__name__)


class Environment(Protocol):
    """Where an interpreter comes from that has to be built first."""

    def ensure(self) -> str:
        """The interpreter's path. Blocking. Raises FatalJobError."""


class ProcessSandbox:
    """One user function; the contract is ``spider_worker.sandbox.base.Sandbox``.

    ``source`` is text that defines ``name``, called as ``name(row, **kwargs)``; a result that
    can be awaited is awaited. ``stage`` goes into every RowError. ``environment`` provides the
    interpreter (None: ``python``, by default the worker's own). ``row_timeout`` is in seconds
    for one row, ``start_timeout`` for running the source (imports included); ``memory_mb``
    bounds the address space in MiB (not for a process that uses CUDA, which reserves far more
    than it uses); ``processes`` bounds processes and threads where the mode isolates (the
    kernel counts a user's over the whole host otherwise). ``mode`` is SPIDER_SANDBOX's.
    ``on_output`` gets what the function prints, in pieces.

    A row goes in as JSON, NaN and infinities as null. A value that comes out must be JSON:
    NaN, an infinity, an integer beyond 64 bits or any other type is an error row of kind
    ``not_json``; tuples become lists. Other kinds are ``timeout``, ``died``, ``garbled`` (it
    wrote to the socket that answers go through) and the name of the exception.
    """

    def __init__(
        self,
        *,
        name: str,
        source: str,
        stage: str,
        kwargs: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        python: str | None = None,
        environment: Environment | None = None,
        row_timeout: float = 30.0,
        start_timeout: float = 120.0,
        memory_mb: int = 2048,
        processes: int = 512,
        mode: str = "auto",
        on_output: Callable[[str], None] | None = None,
    ) -> None:
        self._python = python or sys.executable
        self._environment = environment
        self._mode = mode
        self._start_timeout = start_timeout
        self._processes = processes
        self._on_output = on_output or _ignore
        limits = {
            "RLIMIT_AS": memory_mb << 20,
            "RLIMIT_CORE": 0,
            "RLIMIT_FSIZE": _FILE_BYTES,
            "RLIMIT_NOFILE": _OPEN_FILES,
        }
        self._setup = Setup(
            name=name, source=source, kwargs=dict(kwargs or {}), stage=stage,
            env=dict(env or {}), limits=limits, row_timeout=row_timeout,
        )  # fmt: skip
        self._lock = asyncio.Lock()
        self._channel: Channel | None = None
        self._stopped = False

    async def start(self) -> None:
        async with self._lock:
            await self._running()

    async def call(self, rows: Sequence[dict[str, Any]]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        unsendable: dict[int, Outcome] = {}
        async with self._lock:
            for lines in _chunks(rows, unsendable, self._setup.stage):
                outcomes += await self._run(lines)
        for position in sorted(unsendable):  # they had no line: back to their places
            outcomes.insert(position, unsendable[position])
        return outcomes

    async def stop(self) -> None:
        # Without the lock: a call that hangs is what a stop may have to end.
        self._stopped = True
        await self._discard()

    async def _running(self) -> Channel:
        if self._stopped:
            raise SandboxError("the sandbox was stopped")
        if self._channel is None:
            if self._environment is not None:
                self._python = await asyncio.to_thread(self._environment.ensure)
            interpreter = await asyncio.to_thread(inspect_interpreter, self._python)
            launcher = await asyncio.to_thread(choose_launcher, self._mode, interpreter)
            setup = self._setup
            if launcher.isolated:
                setup = setup.with_limit("RLIMIT_NPROC", self._processes)
            channel = await Channel.open(
                launcher, self._python, setup,
                patience=self._start_timeout, on_output=self._on_output,
            )  # fmt: skip
            if self._stopped:
                await channel.kill()
                raise SandboxError("the sandbox was stopped")
            self._channel = channel
        return self._channel

    async def _discard(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.kill()

    async def _run(self, lines: Sequence[bytes]) -> list[Outcome]:
        """Outcomes of a chunk, however often the process has to be started for it."""
        outcomes: list[Outcome] = []
        blameless = 0
        while len(outcomes) < len(lines):
            rest = lines[len(outcomes) :]
            channel = await self._running()
            try:
                exchange = await channel.exchange(rest, self._setup.row_timeout)
            except BaseException:
                # Cancelled midway: answers to rows nobody waits for are still to come.
                await self._discard()
                raise
            outcomes += [self._outcome(answer) for answer in exchange.answers]
            if exchange.failure is None:
                continue
            if self._stopped:
                raise SandboxError("the sandbox was stopped")
            how = _HOW.get(exchange.failure) or await channel.ending()
            await self._discard()
            done, begun = len(exchange.answers), exchange.begun
            if begun > done:
                # Those before the one that was running had ended, but their answers were lost.
                outcomes += await self._run(rest[done : begun - 1])
                outcomes.append(self._broken(exchange.failure, how))
                blameless = 0
                continue
            blameless += 1
            if blameless >= _RESTARTS_WITHOUT_A_ROW:
                raise SandboxError(
                    f"{self._setup.stage}: the sandbox process {how} {blameless} times in a row "
                    "with no row running"
                )
        return outcomes

    def _outcome(self, answer: list[Any]) -> Outcome:
        if answer[0] == 0:
            return Outcome(answer[1])
        _, kind, message, trace = answer
        return Outcome(None, RowError(message, stage=self._setup.stage, kind=kind, trace=trace))

    def _broken(self, failure: str, how: str) -> Outcome:
        name = self._setup.name
        if failure == "timeout":
            message = (
                f"{name} took more than {self._setup.row_timeout:g} s for this row "
                "(the limit is the worker's SPIDER_SANDBOX_ROW_TIMEOUT)"
            )
        else:
            message = f"the process {how} while {name} ran on this row"
        _logger.warning("%s: %s", self._setup.stage, message)
        return Outcome(None, RowError(message, stage=self._setup.stage, kind=failure))


def _chunks(
    rows: Sequence[dict[str, Any]], unsendable: dict[int, Outcome], stage: str
) -> Iterator[list[bytes]]:
    """Rows as JSON lines, in chunks; those that are no JSON go to ``unsendable`` instead."""
    lines: list[bytes] = []
    size = 0
    for position, row in enumerate(rows):
        try:
            line = _dumps(row)
        except (TypeError, ValueError, RecursionError) as error:
            text = f"the row is no JSON: {error}"
            unsendable[position] = Outcome(None, RowError(text, stage=stage, kind="not_json"))
            continue
        if lines and (len(lines) == _CHUNK_ROWS or size + len(line) > _CHUNK_BYTES):
            yield lines
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield lines


def _dumps(row: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(row)
    except TypeError:
        with contextlib.suppress(UnicodeEncodeError):
            # What orjson refuses and JSON has: integers beyond 64 bits, keys that are numbers.
            return json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
        raise


def _ignore(_: str) -> None:
    """Nobody asked for what the function prints."""
