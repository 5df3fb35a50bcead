"""Post-processing: completions wait in the journal, not in memory, so that a slow function holds
up neither the engine nor the machine."""

from __future__ import annotations

__all__ = ["Backlog", "PostStage"]

import asyncio
import time
from collections import deque
from typing import Any, Final

from spider_sdk.errors import RowError
from spider_worker.pipelines.offline_gen.journal import decode, encode
from spider_worker.pipelines.offline_gen.ledger import State
from spider_worker.pipelines.offline_gen.records import post_processed
from spider_worker.pipelines.offline_gen.unit import UnitRows
from spider_worker.pipelines.rows.reader import BatchSizer
from spider_worker.sandbox.base import Outcome, Sandbox


class Backlog:
    """Completions of all units of a runner that wait for the post-processor.

    The engine runs ahead of a slow function, but not through the whole job: a runner that took
    every unit and finished none would leave nothing to other workers.
    """

    MOST: Final = 10_000  # rows

    def __init__(self) -> None:
        self._rows = 0
        self._short = asyncio.Event()
        self._short.set()

    def add(self, rows: int) -> None:
        self._rows += rows
        if self._rows > self.MOST:
            self._short.clear()
        else:
            self._short.set()

    async def short(self) -> None:
        """Return when another unit may be begun."""
        await self._short.wait()


class PostStage:
    """Hands pending records to the sandbox and finishes them.

    The function gets the record (source columns included). It returns a dict, which replaces
    everything but ``id``, ``index`` and ``sample``, or None, which drops the record. Where it
    raises, the record keeps its completion and becomes an error row of stage
    ``post_processor``; asking for it again repeats the function alone.
    """

    def __init__(self, sandbox: Sandbox, backlog: Backlog) -> None:
        self._sandbox = sandbox
        self._backlog = backlog
        self._waiting: deque[int] = deque()
        self._more = asyncio.Event()
        self._closing = False
        self._sizer = BatchSizer()

    def add(self, slot: int) -> None:
        self._backlog.add(1)
        self._waiting.append(slot)
        self._more.set()

    def close(self) -> None:
        """Nothing will be added any more: ``run`` returns when all is done."""
        self._closing = True
        self._more.set()

    def abandon(self) -> None:
        """What still waits is left to the next attempt."""
        self._backlog.add(-len(self._waiting))
        self._waiting.clear()

    async def run(self, rows: UnitRows) -> None:
        while True:
            if self._waiting:
                await self._batch(rows)
            elif self._closing:
                return
            else:
                self._more.clear()
                await self._more.wait()

    async def _batch(self, rows: UnitRows) -> None:
        count = min(self._sizer.size, len(self._waiting))
        slots = [self._waiting.popleft() for _ in range(count)]
        self._backlog.add(-count)
        records = [decode(rows.journal.read(*rows.ledger.place(s)))["record"] for s in slots]
        started = time.monotonic()
        outcomes = await self._sandbox.call(records)
        self._sizer.took(count, time.monotonic() - started)
        for record, outcome in zip(records, outcomes, strict=True):
            _finish(rows, record, outcome)


def _finish(rows: UnitRows, record: dict[str, Any], outcome: Outcome) -> None:
    index, sample = record["index"], record["sample"]
    value, error = outcome.value, outcome.error
    if error is None and value is None:
        rows.write_dropped(index, (sample,))
        return
    if error is None and not isinstance(value, dict):
        text = f"the post-processor returned {type(value).__name__}, expected a dict or None"
        error = RowError(text, stage="post_processor", kind="bad_answer")
    if error is not None:
        made = {**record, "error": rows.errors.document(error)}
    else:
        made = post_processed(record, value, rows.errors)
    if made.get("error") is None:
        rows.write(index, sample, State.OK, encode(made) + b"\n")
    else:
        rows.write_failed(made)
