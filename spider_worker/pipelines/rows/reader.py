"""Rows from the source, read ahead on a thread; batches that fit how slow a function is."""

from __future__ import annotations

__all__ = ["BATCH", "BatchSizer", "Reader"]

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from spider_worker.sources.base import IndexedRow, Source

T = TypeVar("T")

BATCH: Final = 256  # rows


class BatchSizer:
    """How many rows to give a user function at once: enough that the way there and back does
    not count, few enough that one batch takes well under a second."""

    _FAST, _SLOW = 0.1, 0.5  # seconds

    def __init__(self, first: int = 8, largest: int = BATCH) -> None:
        self.size = first
        self._largest = largest

    def took(self, rows: int, seconds: float) -> None:
        if seconds < self._FAST and rows == self.size:
            self.size = min(self._largest, self.size * 2)
        elif seconds > self._SLOW:
            self.size = max(1, self.size // 2)


class Reader:
    """A source on a thread of its own, one batch ahead of whoever asks.

    All calls into the source happen on that thread, so a source need not be thread-safe. A
    stream (a source that cannot count) keeps its place between units: the next one goes on where
    the last one stopped, without skipping there again.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="source")
        self._stream: _Stream | None = None

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function of the source's on its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def batches(
        self, start: int, stop: int, *, stream: bool = False
    ) -> AsyncGenerator[list[IndexedRow], None]:
        """Rows from ``start`` to ``stop`` (exclusive), or to the end of the data."""
        iterator = await self.call(
            (lambda: self._streamed(start, stop))
            if stream
            else (lambda: self.source.batches(start, stop, BATCH))
        )
        loop = asyncio.get_running_loop()
        ahead = loop.run_in_executor(self._thread, next, iterator, None)
        try:
            while (batch := await ahead) is not None:
                ahead = loop.run_in_executor(self._thread, next, iterator, None)
                yield batch
        finally:
            # Left early: the batch under way must not go unheard when it fails.
            if not ahead.cancel():
                ahead.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def goes_on_at(self, index: int) -> bool:
        """Whether a stream has a row at ``index``."""
        return await self.call(lambda: self._goes_on_at(index))

    async def close(self) -> None:
        await self.call(self.source.close)
        self._thread.shutdown(wait=False)

    def _goes_on_at(self, index: int) -> bool:
        if self._stream is not None and self._stream.ended and self._stream.position <= index:
            return False
        return self._at(index).peek() is not None

    def _at(self, index: int) -> _Stream:
        if self._stream is None or self._stream.position != index:
            self._stream = _Stream(index, self.source.batches(index, None, BATCH))
        return self._stream

    def _streamed(self, start: int, stop: int) -> Iterator[list[IndexedRow]]:
        stream = self._at(start)
        while stream.position < stop:
            batch = stream.take(stop - stream.position)
            if not batch:
                return
            yield batch


class _Stream:
    """An iterator with a place: ``position`` is the index of the next row, or where there is
    none (``ended``), the number of rows."""

    def __init__(self, position: int, batches: Iterator[list[IndexedRow]]) -> None:
        self.position = position
        self.ended = False
        self._batches = batches
        self._held: list[IndexedRow] = []

    def peek(self) -> IndexedRow | None:
        while not self._held:
            batch = next(self._batches, None)
            if batch is None:
                self.ended = True
                return None
            self._held = batch
        return self._held[0]

    def take(self, most: int) -> list[IndexedRow]:
        """Up to ``most`` rows; empty at the end of the data."""
        if self.peek() is None:
            return []
        taken, self._held = self._held[:most], self._held[most:]
        self.position += len(taken)
        return taken
