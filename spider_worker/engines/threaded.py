"""An engine that lives on one thread, fed from and answering to one event loop.

What a local model needs is the same whichever library runs it: one thread that makes the
model, advances it and ends it; requests that reach it through a queue; finished ones that
come back with one wake-up of the loop for all of them; cancelled ones that are dropped.
A subclass says what ``_load``, ``_admit``, ``_drop``, ``_advance`` and ``_unload`` mean.
"""

from __future__ import annotations

__all__ = ["Outcome", "Request", "ThreadedEngine"]

import abc
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from spider_sdk.errors import EngineUnavailable, NotSupported, PipelineError, SpiderError
from spider_worker.engines.base import Completion, EngineInfo, EngineStats, SamplingParams

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """One call of ``complete`` on its way. ``future`` belongs to the event loop; ``cancelled``
    is set there and may be read on the engine's thread."""

    id: str
    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    future: asyncio.Future[Completion]
    cancelled: bool = False


@dataclasses.dataclass(frozen=True)
class _Call:
    """Run ``function`` between two advances."""

    function: Callable[[], Any]
    future: concurrent.futures.Future[Any]


@dataclasses.dataclass(frozen=True)
class _Drop:
    request: Request


Outcome = tuple[Request, Completion | SpiderError]


class ThreadedEngine(abc.ABC):
    """Base of the engines that run a model in this process."""

    name: str
    linger = 0.0  #: seconds that an idle engine waits for company of a first request

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[Request | _Drop | _Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._numbers = itertools.count()
        self._in_flight = 0
        self._dead: PipelineError | None = None
        self._closing = False
        self._pending: dict[str, Request] = {}  # of the engine's thread

    @property
    @abc.abstractmethod
    def info(self) -> EngineInfo: ...

    def stats(self) -> EngineStats:
        return EngineStats(in_flight=self._in_flight, limit=self.info.capacity)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name=f"{self.name}-engine", daemon=True
        )
        self._thread.start()
        await asyncio.wrap_future(ready)

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._closing = True
            self._inbox.put(None)
            await asyncio.to_thread(thread.join)

    async def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        params: SamplingParams,
    ) -> Completion:
        if tools:
            raise NotSupported(f"The {self.name} engine does not take tools yet.")
        if self._thread is None or self._loop is None:
            raise PipelineError(f"The {self.name} engine was used before start or after close.")
        if self._dead is not None:
            raise PipelineError(self._dead.message)
        future: asyncio.Future[Completion] = self._loop.create_future()
        request = Request(str(next(self._numbers)), messages, params, future)
        self._in_flight += 1
        self._inbox.put(request)
        try:
            return await future
        except asyncio.CancelledError:
            request.cancelled = True
            self._inbox.put(_Drop(request))
            raise
        finally:
            self._in_flight -= 1

    async def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` on the engine's thread, between two advances (benchmarks do)."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._inbox.put(_Call(function, future))
        return await asyncio.wrap_future(future)

    # What follows runs on the engine's thread.

    @abc.abstractmethod
    def _load(self) -> None:
        """Make the model. Whatever it raises becomes EngineUnavailable."""

    @abc.abstractmethod
    def _admit(self, request: Request) -> None:
        """Take a request in. A SpiderError answers it."""

    @abc.abstractmethod
    def _drop(self, request: Request) -> None:
        """Give up a request that is pending."""

    @abc.abstractmethod
    def _advance(self) -> list[Outcome]:
        """Work on what is pending for a while; what has finished."""

    @abc.abstractmethod
    def _unload(self) -> None:
        """Free everything. Runs also after a ``_load`` that failed half-way."""

    def _run(self, ready: concurrent.futures.Future[None]) -> None:
        try:
            try:
                self._load()
            except SpiderError:
                raise
            except Exception as error:
                # The boundary to the library: whatever it raises, the model cannot be served
                # here, and its own words are the best there are.
                log.exception("the %s engine could not start", self.name)
                raise EngineUnavailable(
                    f"The {self.name} engine could not start: {type(error).__name__}: {error}"
                ) from error
        except SpiderError as error:
            self._unload()
            ready.set_exception(error)
            return
        ready.set_result(None)
        try:
            while self._take():
                if self._pending:
                    self._finish(self._advance())
        except Exception as error:
            log.exception("the %s engine failed", self.name)
            self._die(error)
        finally:
            self._fail_pending(PipelineError(f"The {self.name} engine was closed."))
            self._unload()

    def _take(self) -> bool:
        """Take in what has come, waiting only if there is nothing to do. False: end."""
        idle = not self._pending
        while True:
            try:
                if not self._pending:
                    item = self._inbox.get()
                elif idle and self.linger:
                    item = self._inbox.get(timeout=self.linger)
                else:
                    item = self._inbox.get_nowait()
            except queue.Empty:
                return True
            if item is None:
                return False
            self._handle(item)

    def _handle(self, item: Request | _Drop | _Call) -> None:
        if isinstance(item, _Drop):
            if self._pending.pop(item.request.id, None) is not None:
                self._drop(item.request)
        elif isinstance(item, _Call):
            _answer(item)
        elif not item.cancelled:
            try:
                self._admit(item)
            except SpiderError as error:
                self._post([(item, error)])
            else:
                self._pending[item.id] = item

    def _finish(self, outcomes: list[Outcome]) -> None:
        for request, _ in outcomes:
            self._pending.pop(request.id, None)
        self._post(outcomes)

    def _post(self, outcomes: list[Outcome]) -> None:
        # The loop may be closed already if the process is going down.
        if outcomes and self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_deliver, outcomes)

    def _die(self, error: Exception) -> None:
        """Answer whatever still comes, until ``close`` asks for the end."""
        self._dead = dead = PipelineError(
            f"The {self.name} engine failed: {type(error).__name__}: {error}"
        )
        self._fail_pending(dead)
        while (item := self._inbox.get()) is not None:
            if isinstance(item, Request):
                self._post([(item, dead)])
            elif isinstance(item, _Call):
                item.future.set_exception(dead)

    def _fail_pending(self, error: PipelineError) -> None:
        pending, self._pending = self._pending, {}
        self._post([(request, error) for request in pending.values()])


def _deliver(outcomes: list[Outcome]) -> None:
    for request, outcome in outcomes:
        if request.future.done():  # cancelled meanwhile
            continue
        if isinstance(outcome, Completion):
            request.future.set_result(outcome)
        else:
            request.future.set_exception(outcome)


def _answer(call: _Call) -> None:
    try:
        call.future.set_result(call.function())
    except BaseException as error:  # noqa: BLE001 - it belongs to the caller
        call.future.set_exception(error)
