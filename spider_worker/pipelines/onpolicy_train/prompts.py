"""Prompts in the order of the data, with a place to go on from, and the rows that are held out."""

from __future__ import annotations

__all__ = ["Cursor", "Prompt", "PromptStream", "held_out_rows"]

import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Final

from spider_sdk.errors import FatalJobError, RowError
from spider_worker.pipelines.rows.prompts import Prepared, Preparer
from spider_worker.pipelines.rows.reader import BatchSizer, Reader
from spider_worker.sandbox.base import Sandbox
from spider_worker.sources.base import IndexedRow

MOST_HELD_OUT: Final = 64
_ENDLESS: Final = 2**62  # rows, of a stream


def held_out_rows(
    rows: int | None, wanted: int | None, *, most: int | None = None
) -> tuple[int, ...]:
    """Indices of the rows that evaluations use and training leaves out: ``wanted`` of them (None:
    a tenth, at most 64, at least one), spread evenly over the data, so that sorted data is
    fairly represented; of a stream (``rows`` None, at ``most`` so many) its first. One row is too
    few to share.

    Raises FatalJobError where nothing would be left to train on.
    """
    known = most if rows is None else rows
    if known is None:
        return tuple(range(wanted or MOST_HELD_OUT))
    if wanted is None:
        if known < 2:
            return ()
        wanted = min(MOST_HELD_OUT, max(1, known // 10))
    if wanted >= known:
        raise FatalJobError(
            f"generation.on_policy_options.eval_examples holds out {wanted} rows, and the data has"
            f" {known}: nothing is left to train on. Set it lower"
        )
    if rows is None:
        return tuple(range(wanted))
    return tuple((2 * number + 1) * rows // (2 * wanted) for number in range(wanted))


@dataclasses.dataclass(frozen=True, slots=True)
class Cursor:
    """The next row to read."""

    epoch: int = 0
    index: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """``after`` is the cursor behind this row."""

    index: int
    epoch: int
    prepared: Prepared
    after: Cursor


class PromptStream:
    """Prompts of all epochs from a cursor on. ``rows`` None: a stream of unknown length.

    A row that yields no prompt is left out and counted: in ``errors`` where something was wrong
    with it (``on_error`` hears of the first), in ``dropped`` where the pre-processor said so.
    """

    def __init__(
        self,
        reader: Reader,
        pre: Sandbox | None,
        preparer: Preparer,
        *,
        rows: int | None,
        held_out: Sequence[int],
        epochs: int,
        on_error: Callable[[int, RowError], None],
    ) -> None:
        self._reader = reader
        self._pre = pre
        self._preparer = preparer
        self._rows = rows
        self._held_out = frozenset(held_out)
        self._epochs = epochs
        self._on_error = on_error
        self._sizer = BatchSizer()
        self._open: AsyncGenerator[Prompt, None] | None = None
        self.errors = 0
        self.dropped = 0

    async def take(self, most: int, cursor: Cursor) -> list[Prompt]:
        """The next prompts from ``cursor`` on, which is the last one's ``after`` or, once, where
        a resumed run left off; fewer than ``most``, or none, at the end of the last epoch."""
        if self._open is None:
            self._open = self._from(cursor)
        taken: list[Prompt] = []
        while len(taken) < most:
            prompt = await anext(self._open, None)
            if prompt is None:
                break
            taken.append(prompt)
        return taken

    async def held_out(self) -> list[Prompt]:
        """The prompts of the rows that are held out."""
        found: list[Prompt] = []
        runs = itertools.groupby(
            enumerate(sorted(self._held_out)), key=lambda pair: pair[1] - pair[0]
        )
        for _, run in runs:
            indices = [index for _, index in run]
            batches = self._reader.batches(indices[0], indices[-1] + 1)
            async for batch in batches:
                found += [prompt async for prompt in self._prompts(batch, 0)]
        return found

    async def close(self) -> None:
        if self._open is not None:
            await self._open.aclose()

    async def _from(self, cursor: Cursor) -> AsyncGenerator[Prompt, None]:
        stop = _ENDLESS if self._rows is None else self._rows
        for epoch in range(cursor.epoch, self._epochs):
            start = cursor.index if epoch == cursor.epoch else 0
            usable = start > 0
            stream = self._rows is None
            async for batch in self._reader.batches(start, stop, stream=stream):
                wanted = [row for row in batch if row[0] not in self._held_out]
                async for prompt in self._prompts(wanted, epoch):
                    usable = True
                    yield prompt
            if not usable:
                said = (
                    f"no row of the data makes a prompt: {self.errors} went wrong and"
                    f" {self.dropped} were dropped by the pre-processor"
                )
                if stream and self._held_out:
                    said += (
                        f"; the first {len(self._held_out)} of the stream are held out for"
                        " evaluations: set on_policy_options.eval_examples lower where it has"
                        " hardly more"
                    )
                raise FatalJobError(said)

    async def _prompts(
        self, rows: Sequence[IndexedRow], epoch: int
    ) -> AsyncGenerator[Prompt, None]:
        waiting = list(rows)
        while waiting:
            size = len(waiting) if self._pre is None else self._sizer.size
            part, waiting = waiting[:size], waiting[size:]
            for (index, _), prepared in zip(part, await self._prepare(part), strict=True):
                # Counted here and not where it is made: what was read ahead is read again when
                # a run goes on from an earlier prompt.
                if isinstance(prepared, RowError):
                    self.errors += 1
                    if self.errors == 1:
                        self._on_error(index, prepared)
                elif prepared is None:
                    self.dropped += 1
                else:
                    yield Prompt(index, epoch, prepared, Cursor(epoch, index + 1))

    async def _prepare(self, part: Sequence[IndexedRow]) -> list[Prepared | RowError | None]:
        if self._pre is None:
            return [self._one(row, None) for _, row in part]
        started = time.monotonic()
        outcomes = await self._pre.call([row for _, row in part])
        self._sizer.took(len(part), time.monotonic() - started)
        return [self._one(row, outcome) for (_, row), outcome in zip(part, outcomes, strict=True)]

    def _one(self, row: dict[str, Any], outcome: Any) -> Prepared | RowError | None:
        try:
            if outcome is None:
                return self._preparer.from_row(row)
            return self._preparer.from_outcome(row, outcome)
        except RowError as error:
            return error
