"""A data set read from front to end, without a copy on disk."""

from __future__ import annotations

__all__ = ["SHUFFLE_BUFFER", "StreamingSource"]

import random
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

from spider_worker.sources.base import IndexedRow, Row
from spider_worker.sources.convert import table_rows
from spider_worker.sources.loading import DatasetSpec, hub_errors, load
from spider_worker.sources.splits import SplitPart

SHUFFLE_BUFFER: Final = 10_000
"""Rows that a streaming shuffle holds. It draws each row at random from the next so many of
the stream: a row moves forward by at most that, so data sorted by some property stays sorted
at a larger scale. The order depends on the seed and the stream alone."""

_READ_ROWS = 256
_KEPT_CURSORS = 2


class StreamingSource:
    """Rows of a stream; ``parts`` follow one another, then ``shuffle_seed`` (None: no
    shuffle), then ``max_examples``.

    A stream can only be read forward, so a place in it is kept when ``batches`` ends: a
    call that starts there or later goes on from it, and only one that starts before opens
    the stream again and skips.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        parts: Sequence[SplitPart],
        *,
        shuffle_seed: int | None = None,
        max_examples: int | None = None,
    ) -> None:
        self._spec = spec
        self._parts = tuple(parts)
        self._shuffle_seed = shuffle_seed
        self._max_examples = max_examples
        self._datasets: dict[str, Any] = {}
        self._kept: list[_Cursor] = []
        self._lock = threading.Lock()

    def count(self) -> None:
        return None

    def columns(self) -> list[str] | None:
        with hub_errors(self._spec):
            names = self._dataset(self._parts[0].name).column_names
        return None if names is None else list(names)

    def batches(self, start: int, stop: int | None, size: int = 256) -> Iterator[list[IndexedRow]]:
        if self._max_examples is not None:
            stop = self._max_examples if stop is None else min(stop, self._max_examples)
        if stop is not None and start >= stop:
            return
        cursor = self._cursor(start)
        while stop is None or cursor.position < stop:
            first = cursor.position
            # After an error the cursor is dropped: what it reads from has ended, not its data.
            with hub_errors(self._spec):
                rows = cursor.take(size if stop is None else min(size, stop - first))
            if not rows:
                break
            try:
                yield list(enumerate(rows, first))
            except GeneratorExit:
                self._keep(cursor)
                raise
        self._keep(cursor)

    def close(self) -> None:
        with self._lock:
            self._kept.clear()
            self._datasets.clear()

    def _keep(self, cursor: _Cursor) -> None:
        with self._lock:
            self._kept = [*self._kept, cursor][-_KEPT_CURSORS:]

    def _cursor(self, start: int) -> _Cursor:
        """A cursor at ``start``, for one caller alone."""
        with self._lock:
            behind = [cursor for cursor in self._kept if cursor.position <= start]
            cursor = max(behind, key=lambda one: one.position, default=None)
            if cursor is not None:
                self._kept.remove(cursor)
        if cursor is None:
            cursor = _TableCursor(self._tables())
            if self._shuffle_seed is not None:
                cursor = _ShufflingCursor(cursor, self._shuffle_seed)
        with hub_errors(self._spec):
            cursor.skip(start - cursor.position)
        return cursor

    def _tables(self) -> Iterator[Any]:
        for part in self._parts:
            stream = self._dataset(part.name).iter(batch_size=_READ_ROWS)
            yield from _trimmed(stream, part.start, part.stop)

    def _dataset(self, split: str) -> Any:
        with self._lock:
            if split not in self._datasets:
                self._datasets[split] = load(self._spec, split=split, streaming=True)
            return self._datasets[split]


class _Cursor(Protocol):
    """A place in a stream. ``take`` gives up to ``rows`` rows, none at the end."""

    position: int

    def take(self, rows: int) -> list[Row]: ...

    def skip(self, rows: int) -> None: ...


class _TableCursor:
    def __init__(self, tables: Iterator[Any]) -> None:
        self.position = 0
        self._tables = tables
        self._held: Any = None  # what is left of the last table

    def take(self, rows: int) -> list[Row]:
        taken: list[Row] = []
        while len(taken) < rows and (table := self._next(rows - len(taken))) is not None:
            taken += table_rows(table)
        return taken

    def skip(self, rows: int) -> None:
        end = self.position + rows
        while self.position < end and self._next(end - self.position) is not None:
            pass

    def _next(self, rows: int) -> Any:
        """The next table, of ``rows`` rows at most; None at the end."""
        while self._held is None or self._held.num_rows == 0:
            self._held = next(self._tables, None)
            if self._held is None:
                return None
        table, self._held = self._held.slice(0, rows), self._held.slice(rows)
        self.position += table.num_rows
        return table


class _ShufflingCursor:
    def __init__(self, cursor: _Cursor, seed: int) -> None:
        self.position = 0
        self._cursor = cursor
        self._random = random.Random(seed)  # noqa: S311 - an order, not a secret
        self._buffer: list[Row] = []
        self._coming: list[Row] = []

    def take(self, rows: int) -> list[Row]:
        if not self.position:
            self._buffer = self._cursor.take(SHUFFLE_BUFFER)
        taken: list[Row] = []
        while len(taken) < rows and self._buffer:
            place = self._random.randrange(len(self._buffer))
            taken.append(self._buffer[place])
            if not self._coming:
                self._coming = self._cursor.take(_READ_ROWS)[::-1]
            # At the end of the stream the last row fills the gap instead.
            last = self._coming.pop() if self._coming else self._buffer.pop()
            if place < len(self._buffer):
                self._buffer[place] = last
        self.position += len(taken)
        return taken

    def skip(self, rows: int) -> None:
        end = self.position + rows
        while self.position < end and self.take(min(_READ_ROWS, end - self.position)):
            pass


def _trimmed(tables: Iterator[Any], start: int, stop: int | None) -> Iterator[Any]:
    """Rows ``start`` to ``stop`` of a stream of tables; stops reading there."""
    position = 0
    if stop is not None and start >= stop:
        return
    for table in tables:
        first, end = position, position + table.num_rows
        position = end
        if end <= start:
            continue
        low = max(start - first, 0)
        high = table.num_rows if stop is None else min(stop - first, table.num_rows)
        yield table.slice(low, high - low)
        if stop is not None and end >= stop:
            return
