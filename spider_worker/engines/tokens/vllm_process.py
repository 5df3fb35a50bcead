"""A vLLM in a process of its own, as its engine sees it.

Two of them cannot share a process (a student's sampler and a teacher are two): vLLM keeps the
batch under way, its process groups and its scratch memory in module globals. And it changes
torch for whoever else runs there, which is the trainer. What is sent is at the end of this
module; ``vllm_child.py`` is the other side. The process ends when its pipe does, so that it
outlives no runner.
"""

from __future__ import annotations

__all__ = ["Adapter", "Facts", "Fault", "Sample", "Score", "Setup", "VllmProcess"]

import asyncio
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, Final

from spider_sdk.errors import (
    EngineUnavailable,
    FatalJobError,
    NotSupported,
    PipelineError,
    RowError,
)
from spider_worker.engines.tokens.vllm_arguments import process_environment
from spider_worker.tokens import SampleParams

_PATIENCE: Final = 30.0  # seconds for the process to end by itself
_ERRORS: Final[Mapping[str, type[PipelineError]]] = {
    error.__name__: error for error in (EngineUnavailable, FatalJobError, NotSupported)
}


class VllmProcess:
    """Of one event loop. ``start`` once; requests may be made at any time until ``close``."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._over: PipelineError | None = PipelineError(
            "The vllm engine was used before start or after close."
        )

    async def start(self) -> Facts:
        """Raises EngineUnavailable, NotSupported."""
        loop = asyncio.get_running_loop()
        ours, theirs = multiprocessing.Pipe()
        with theirs:
            # Descriptors stay open: among them are the locks on the devices, which count as taken
            # while anyone lives who uses them.
            self._process = subprocess.Popen(  # noqa: ASYNC220 - milliseconds
                [sys.executable, "-m", "spider_worker.engines.tokens.vllm_child"],
                stdin=theirs.fileno(),
                env=process_environment(self._setup.arguments, os.environ),
                close_fds=False,
            )
        self._over = None
        for target in (self._write, self._read):
            thread = threading.Thread(target=target, args=(ours, loop), daemon=True)
            self._threads.append(thread)
            thread.start()
        facts: Facts = await self.ask(self._setup)
        return facts

    async def ask(self, work: Setup | Sample | Score | Adapter) -> Any:
        """What came of it. Raises the error that it came to, or PipelineError once the process
        has ended."""
        if self._over is not None:
            raise type(self._over)(self._over.message)
        number = next(self._numbers)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._outbox.put((number, work))
        try:
            return await future
        except asyncio.CancelledError:
            self._outbox.put((number, None))
            raise
        finally:
            self._waiting.pop(number, None)

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        self._end(PipelineError("The vllm engine was closed."))
        self._outbox.put(None)
        try:
            await asyncio.to_thread(process.wait, _PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        self._over = PipelineError("The vllm engine was used before start or after close.")

    def _deliver(self, outcomes: list[tuple[int | None, Any]]) -> None:
        for number, outcome in outcomes:
            if number is None:  # the process's last words
                self._end(outcome.error())
                continue
            future = self._waiting.get(number)
            if future is None or future.done():  # cancelled meanwhile
                continue
            if isinstance(outcome, Fault):
                future.set_exception(outcome.error())
            else:
                future.set_result(outcome)

    def _end(self, reason: PipelineError) -> None:
        """Nothing more will be answered; the first reason is the one."""
        if self._over is not None:
            return
        self._over = reason
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(type(reason)(reason.message))

    # What follows runs on threads: a pipe whose other side is stuck must not hold up the loop.

    def _write(self, pipe: Connection, _: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(OSError):  # it ended, as the other thread says
            while (message := self._outbox.get()) is not None:
                pipe.send(message)
            pipe.send(None)

    def _read(self, pipe: Connection, loop: asyncio.AbstractEventLoop) -> None:
        process = self._process
        assert process is not None
        with pipe, contextlib.suppress(RuntimeError):  # the loop may be closed, if we go down
            while True:
                try:
                    outcomes = pipe.recv()
                except (EOFError, OSError):
                    break
                loop.call_soon_threadsafe(self._deliver, outcomes)
            code = process.wait()
            self._outbox.put(None)
            how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            reason = PipelineError(f"The vllm process {how}; its log says more.")
            loop.call_soon_threadsafe(self._end, reason)


@dataclasses.dataclass(frozen=True)
class Setup:
    """The first request. ``arguments`` are checked EngineArgs by name, without ``model``, which
    stand at ``where`` in the job. ``lora_rank`` None: no adapter is served. Answered by Facts."""

    model: str
    arguments: Mapping[str, Any]
    where: str
    lora_rank: int | None


@dataclasses.dataclass(frozen=True)
class Facts:
    """``context`` is vLLM's max_model_len, ``topk`` the most that it returns per position."""

    context: int
    vocabulary: int
    topk: int


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A continuation of ``prompt`` for each of ``seeds``, of at most ``limit`` tokens. Answered by
    a list of SampledTokens. ``version`` is the adapter's, None without one."""

    prompt: tuple[int, ...]
    seeds: tuple[int | None, ...]
    limit: int
    params: SampleParams
    version: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """Answered by TokenScores."""

    tokens: tuple[int, ...]
    start: int
    topk: int


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Replace the adapter by the one in ``folder``. Answered by True once nothing there is needed
    any more. Samples under another version are given up."""

    folder: str
    version: int


@dataclasses.dataclass(frozen=True)
class Fault:
    """An error on its way. ``kind`` is a RowError's, None for any other."""

    name: str
    message: str
    kind: str | None = None

    def error(self) -> PipelineError:
        if self.kind is not None:
            return RowError(self.message, stage="generation", kind=self.kind)
        return _ERRORS.get(self.name, PipelineError)(self.message)
