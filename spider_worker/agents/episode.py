"""One episode as its worker sees it: started, heard, ended in time."""

from __future__ import annotations

__all__ = ["Episode", "Heard", "Listener", "Process", "Start", "run_episode"]

import asyncio
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from spider_sdk.errors import WorkspaceError
from spider_worker.agents.pool import PoolGone

#: A line longer than this is no line: an event holds an observation, which the SDK cuts.
_LINE_BYTES: Final = 64 << 20
#: Seconds for a killed episode to be gone. The kernel needs far less.
_PATIENCE: Final = 30.0
#: Seconds for an agent to be ready: its shell has to come up.
_START_SECONDS: Final = 120.0


@dataclasses.dataclass
class Heard:
    """What has been heard of an episode so far; partial where it was ended from outside.

    ``status`` and ``error`` as in ``spider_agent.lines``; ``status`` is ``timeout`` or
    ``cancelled`` where the worker ended it, ``agent_error`` where it did not come up or broke
    without a word, and None while it runs.
    ``seconds`` count from the moment that the agent was ready.
    """

    status: str | None = None
    error: str | None = None
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    tools: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    turns: int = 0
    seconds: float = 0.0

    def take(self, line: Mapping[str, Any]) -> None:
        match line["op"]:
            case "event":
                self.history.append(line["event"])
            case "messages":
                self.messages[line["keep"] :] = line["messages"]
            case "tools":
                self.tools = line["tools"]
            case "metrics":
                self.metrics, self.turns = line["metrics"], line["turns"]
            case "end":
                self.status, self.error = line["status"], line["error"]


Listener = Callable[[Mapping[str, Any], Heard], None]


class Process(Protocol):
    """A started episode. ``ended`` resolves to its exit status once nothing of it is alive; it
    raises WorkspaceError (PoolGone, of the pool) where that is not known. ``kill`` brings that
    about."""

    @property
    def ended(self) -> asyncio.Future[int]: ...

    def kill(self) -> None: ...


Start = Callable[[Sequence[int]], Awaitable[Process]]
"""Starts an episode's process with descriptors to read its request from, to write its lines to,
and for whatever else it prints; they stay the caller's to close. Raises WorkspaceError."""


class Episode:
    """An episode that ``start`` starts. ``log`` is where what the agent prints goes, ``cgroup``
    the ``cgroup.procs`` of a group to run in (a fourth descriptor). It is ended, as ``cancelled``,
    when ``stop`` returns."""

    def __init__(
        self,
        start: Start,
        request: Mapping[str, Any],
        *,
        log: Path,
        timeout: float,
        cgroup: Path | None = None,
        listener: Listener | None = None,
        stop: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.heard = Heard()
        self._start = start
        self._request = request
        self._log = log
        self._timeout = timeout
        self._cgroup = cgroup
        self._listener = listener
        self._stop = stop
        self._ready = asyncio.Event()

    async def run(self) -> Heard:
        """Run it to its end: its own, or the hard one after ``timeout`` seconds of work. Nothing
        of it is alive afterwards, also when this is cancelled. What it runs in may be lost with it,
        which is an end like others. Raises WorkspaceError where it could not be started."""
        request, writing = os.pipe()
        reading, lines = os.pipe()
        opened = [request, lines]
        try:
            opened.append(os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
            if self._cgroup is not None:
                opened.append(os.open(self._cgroup, os.O_WRONLY))
            child = await self._start(opened)
        except BaseException:
            os.close(writing)
            os.close(reading)
            raise
        finally:
            for descriptor in opened:
                os.close(descriptor)
        began = time.monotonic()
        listening = asyncio.create_task(self._listen(reading))
        ready = asyncio.create_task(self._ready.wait())
        stopping = asyncio.ensure_future(self._stop() if self._stop else asyncio.Event().wait())
        try:
            await asyncio.to_thread(_write, writing, json.dumps(self._request).encode() + b"\n")
            late = f"the agent did not come up within {_START_SECONDS:g} s"
            starting = self._wait(
                [ready, child.ended], stopping, _START_SECONDS, ("agent_error", late)
            )
            if await starting:
                began = time.monotonic()
                late = f"it was still at work after {self._timeout:g} s"
                await self._wait(
                    [listening, child.ended], stopping, self._timeout, ("timeout", late)
                )
        finally:
            ready.cancel()
            stopping.cancel()
            with contextlib.suppress(PoolGone):
                child.kill()
            await self._gone(child.ended)
            self.heard.seconds = time.monotonic() - began
            # What it said before it was killed is in the pipe; nobody holds its other end now.
            await asyncio.wait([listening])
        if self.heard.status is None:
            self._explain(child.ended)
        return self.heard

    async def _wait(
        self,
        what: Sequence[asyncio.Future[Any]],
        stopping: asyncio.Future[Any],
        seconds: float,
        late: tuple[str, str],
    ) -> bool:
        """Until one of ``what`` is done, at most so long; after that it is ended as ``late`` says.
        False where it is to be ended."""
        done, _ = await asyncio.wait(
            [*what, stopping], timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            self.heard.status, self.heard.error = late
            return False
        if stopping in done and self.heard.status is None:
            self.heard.status, self.heard.error = "cancelled", "the job was cancelled"
        return stopping not in done

    async def _gone(self, ended: asyncio.Future[int]) -> None:
        with contextlib.suppress(WorkspaceError):
            async with asyncio.timeout(_PATIENCE):
                await asyncio.shield(ended)

    async def _listen(self, descriptor: int) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_LINE_BYTES)
        with os.fdopen(descriptor, "rb", buffering=0) as pipe:
            transport, _ = await loop.connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), pipe
            )
            try:
                while (line := await reader.readline()).endswith(b"\n"):
                    self._hear(json.loads(line))
            finally:
                transport.close()

    def _hear(self, line: Mapping[str, Any]) -> None:
        if self.heard.status is not None:
            return  # it was ended from outside, and what it said since changes nothing
        if line["op"] == "ready":
            self._ready.set()
        self.heard.take(line)
        if self._listener is not None:
            self._listener(line, self.heard)

    def _explain(self, ended: asyncio.Future[int]) -> None:
        """It ended without a word of how."""
        self.heard.status = "agent_error"
        if (lost := ended.exception()) is not None:
            why = "" if isinstance(lost, PoolGone) else f": {lost}"
            self.heard.error = f"the agent was lost with what it ran in{why}"
            return
        said = self._log.read_text(errors="replace").strip().splitlines()
        last = said[-1] if said else "it printed nothing"
        self.heard.error = (
            f"the agent's process ended with {ended.result()} and no last word: {last}"
        )


async def run_episode(start: Start, request: Mapping[str, Any], **options: Any) -> Heard:
    """Run one episode to its end (see ``Episode``)."""
    return await Episode(start, request, **options).run()


def _write(descriptor: int, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), os.fdopen(descriptor, "wb") as pipe:
        pipe.write(data)
