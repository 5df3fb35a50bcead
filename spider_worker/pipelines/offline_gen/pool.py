"""The request pool: one for the whole runner, so that overlapping units share one bound on
requests in flight and the engine is full whenever any of them has a request to issue."""

from __future__ import annotations

__all__ = ["Owner", "Request", "RequestPool"]

import asyncio
import dataclasses
import traceback
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from spider_sdk.errors import PipelineError, RowError
from spider_worker.engines.base import Completion, Engine
from spider_worker.pipelines.rows.prompts import Prepared


class Owner(Protocol):
    """Who hears what became of a request. Called from the event loop, must not raise."""

    def completed(self, request: Request, completion: Completion) -> None: ...

    def row_failed(self, request: Request, error: RowError) -> None: ...

    def broke(self, error: BaseException) -> None:
        """The engine failed as a whole, or the request was given up (CancelledError)."""


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """One sample of one row on its way to the engine."""

    owner: Owner
    index: int
    sample: int
    prepared: Prepared
    params: Mapping[str, Any]


class RequestPool:
    """Keeps up to ``limit`` requests in flight, first come first served.

    Workers are tasks that live while there is something to issue; none is made a request.
    """

    def __init__(self, engine: Engine, limit: int) -> None:
        self.engine = engine
        self.limit = limit
        self._queue: deque[Request] = deque()
        self._flying: dict[Request, asyncio.Task[None]] = {}
        self._workers: set[asyncio.Task[None]] = set()
        self._waiting_for_room: deque[asyncio.Future[None]] = deque()
        # A feeder that refills when half is gone always leaves enough to issue at once.
        self._high = max(2 * limit, 64)
        self._closed = False

    @property
    def in_flight(self) -> int:
        return len(self._flying)

    def submit(self, requests: Iterable[Request]) -> None:
        self._queue.extend(requests)
        self._spawn()

    async def room(self) -> None:
        """Return when the queue is short enough to be fed again."""
        while len(self._queue) >= self._high:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting_for_room.append(waiter)
            await waiter

    def withdraw(self, owner: Owner) -> int:
        """Drop the owner's requests that were not issued yet; returns how many."""
        kept = deque(request for request in self._queue if request.owner is not owner)
        dropped = len(self._queue) - len(kept)
        # The workers hold this very deque.
        self._queue.clear()
        self._queue.extend(kept)
        self._wake_feeders()
        return dropped

    def abandon(self, owner: Owner) -> None:
        """Cancel the owner's requests in flight; ``broke`` hears of each."""
        for request, task in list(self._flying.items()):
            if request.owner is owner:
                task.cancel()

    async def close(self) -> None:
        """Give up everything. Idempotent."""
        self._closed = True
        self._queue.clear()
        workers = list(self._workers)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

    def _spawn(self) -> None:
        if self._closed:
            return
        wanted = min(self.limit - len(self._workers), len(self._queue))
        for _ in range(wanted):
            worker = asyncio.create_task(self._work())
            self._workers.add(worker)
            worker.add_done_callback(self._ended)

    def _ended(self, worker: asyncio.Task[None]) -> None:
        self._workers.discard(worker)
        self._spawn()

    async def _work(self) -> None:
        queue, flying = self._queue, self._flying
        complete = self.engine.complete
        task = asyncio.current_task()
        assert task is not None
        low = self._high // 2
        while queue:
            request = queue.popleft()
            if len(queue) <= low and self._waiting_for_room:
                self._wake_feeders()
            owner = request.owner
            flying[request] = task
            try:
                completion = await complete(request.prepared.messages, (), request.params)
            except asyncio.CancelledError as error:
                # Withdrawn by its owner: this worker ends and another takes its place.
                owner.broke(error)
                raise
            except RowError as error:
                owner.row_failed(request, error)
            except PipelineError as error:
                owner.broke(error)
                self.withdraw(owner)  # at once: no request more on an engine that is lost
            except Exception as error:  # noqa: BLE001 - a row that raises is an error row
                owner.row_failed(request, _unexpected(error))
            else:
                owner.completed(request, completion)
            finally:
                del flying[request]
            # The journal writes this row before the worker issues another, so what a crash
            # can repeat is never more than what fits into the pool.
            await asyncio.sleep(0)

    def _wake_feeders(self) -> None:
        while self._waiting_for_room:
            waiter = self._waiting_for_room.popleft()
            if not waiter.done():
                waiter.set_result(None)


def _unexpected(error: Exception) -> RowError:
    trace = "".join(traceback.format_exception(error))
    text = str(error) or type(error).__name__
    return RowError(text, stage="generation", kind=type(error).__name__, trace=trace)
