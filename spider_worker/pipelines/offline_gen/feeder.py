"""Feeding a unit: rows in, through the pre-processor, requests out, as fast as the pool takes
them."""

from __future__ import annotations

__all__ = ["Feeder"]

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from spider_sdk.errors import PipelineError, RowError
from spider_worker.pipelines.offline_gen.ledger import Ledger
from spider_worker.pipelines.offline_gen.pool import Request, RequestPool
from spider_worker.pipelines.offline_gen.records import request_seed
from spider_worker.pipelines.offline_gen.unit import UnitRows
from spider_worker.pipelines.rows.prompts import Preparer
from spider_worker.pipelines.rows.reader import BatchSizer, Reader
from spider_worker.sandbox.base import Outcome, Sandbox
from spider_worker.sources.base import IndexedRow

_Batch = list[tuple[IndexedRow, Outcome | None]]


class Feeder:
    """Makes the requests of units of one job. ``seed`` None samples freely."""

    def __init__(
        self,
        reader: Reader,
        pre: Sandbox | None,
        preparer: Preparer,
        parameters: Mapping[str, Any],
        seed: int | None,
    ) -> None:
        self._reader = reader
        self._pre = pre
        self._preparer = preparer
        self._parameters = parameters
        self._seed = seed
        self._sizer = BatchSizer()

    async def feed(self, rows: UnitRows, pool: RequestPool, *, stream: bool) -> None:
        """Submit what the ledger lacks; returns when the pool has taken the last request.

        Raises PipelineError where the source has fewer rows than when the job was planned.
        """
        span = rows.ledger.missing_range()
        if span is None:
            return
        last = span[0] - 1
        async with aclosing(self._prepared(rows.ledger, *span, stream=stream)) as batches:
            async for batch in batches:
                requests = self._requests(rows, batch)
                rows.issue(len(requests))
                pool.submit(requests)
                last = batch[-1][0][0] if batch else last
                await pool.room()
        # The last row of the span lacked a sample, so it must have come by.
        if not stream and last + 1 < span[1]:
            raise PipelineError(
                f"the source ended after row {last}; {span[1]} rows were there when the job"
                " was planned"
            )

    async def _prepared(
        self, ledger: Ledger, start: int, stop: int, *, stream: bool
    ) -> AsyncGenerator[_Batch, None]:
        """Rows that lack a sample, with what the pre-processor made of them; one batch is in the
        sandbox while the one before it is being issued."""
        async with aclosing(self._reader.batches(start, stop, stream=stream)) as batches:
            if self._pre is None:
                async for batch in batches:
                    yield [(row, None) for row in batch]
                return
            ahead: asyncio.Task[_Batch] | None = None
            try:
                async for batch in batches:
                    wanted = [row for row in batch if ledger.missing_samples(row[0])]
                    while wanted:
                        size = self._sizer.size
                        part, wanted = wanted[:size], wanted[size:]
                        under_way, ahead = ahead, asyncio.create_task(self._call(part, ahead))
                        if under_way is not None:
                            yield await under_way
                if ahead is not None:
                    yield await ahead
            finally:
                if ahead is not None and not ahead.done():
                    ahead.cancel()

    async def _call(self, part: list[IndexedRow], before: asyncio.Task[_Batch] | None) -> _Batch:
        assert self._pre is not None
        if before is not None:
            await asyncio.wait([before])
        started = time.monotonic()
        outcomes = await self._pre.call([row for _, row in part])
        self._sizer.took(len(part), time.monotonic() - started)
        return list(zip(part, outcomes, strict=True))

    def _requests(self, rows: UnitRows, batch: _Batch) -> list[Request]:
        requests: list[Request] = []
        for (index, row), outcome in batch:
            samples = rows.ledger.missing_samples(index)
            if not samples:
                continue
            try:
                if outcome is None:
                    prepared = self._preparer.from_row(row)
                else:
                    made = self._preparer.from_outcome(row, outcome)
                    if made is None:
                        rows.write_dropped(index, tuple(samples))
                        continue
                    prepared = made
            except RowError as error:
                rows.write_error(index, tuple(samples), row, None, error)
                continue
            for sample in samples:
                params = self._params(index, sample)
                requests.append(Request(rows, index, sample, prepared, params))
        return requests

    def _params(self, index: int, sample: int) -> Mapping[str, Any]:
        if self._seed is None:
            return self._parameters
        return {**self._parameters, "seed": request_seed(self._seed, index, sample)}
