"""What becomes of the rows of one unit: every outcome goes through here into the journal."""

from __future__ import annotations

__all__ = ["UnitRows"]

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from spider_sdk.errors import RowError
from spider_worker.engines.base import Completion
from spider_worker.pipelines.offline_gen.journal import (
    Journal,
    dropped_line,
    encode,
    pending_line,
)
from spider_worker.pipelines.offline_gen.ledger import Ledger, State
from spider_worker.pipelines.offline_gen.pool import Request
from spider_worker.pipelines.offline_gen.records import ErrorText, error_record, good_record
from spider_worker.pipelines.offline_gen.tally import Tally
from spider_worker.pipelines.rows.prompts import Prepared


class UnitRows:
    """The requests' owner. ``on_pending`` takes the slot of each completion that is to be
    post-processed; None: a completion is a finished row."""

    def __init__(
        self,
        ledger: Ledger,
        journal: Journal,
        tally: Tally,
        errors: ErrorText,
        on_pending: Callable[[int], None] | None,
    ) -> None:
        self.ledger = ledger
        self.journal = journal
        self.tally = tally
        self.errors = errors
        #: Done when the unit cannot go on, with the reason.
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.on_error: Callable[[Mapping[str, Any]], None] | None = None
        self._on_pending = on_pending
        self._outstanding = 0
        self._answered = asyncio.Event()
        self._answered.set()

    def issue(self, requests: int) -> None:
        """Count requests that are about to be submitted."""
        if requests:
            self._outstanding += requests
            self._answered.clear()

    def withdrawn(self, requests: int) -> None:
        """Requests that were taken back before the engine saw them."""
        self._outstanding -= requests
        if not self._outstanding:
            self._answered.set()

    async def answered(self) -> None:
        """Return when no request is out."""
        await self._answered.wait()

    def fail(self, error: BaseException) -> None:
        if not self.failure.done():
            self.failure.set_exception(error)

    # What the pool tells.

    def completed(self, request: Request, completion: Completion) -> None:
        try:
            self.tally.used(completion.usage)
            index, sample = request.index, request.sample
            record = encode(good_record(index, sample, request.prepared, completion))
            if self._on_pending is None:
                self.write(index, sample, State.OK, record + b"\n")
            else:
                self.write(index, sample, State.PENDING, pending_line(record))
                slot = self.ledger.slot(index, sample)
                assert slot is not None
                self._on_pending(slot)
        except Exception as error:  # noqa: BLE001 - raised again by whoever awaits ``failure``
            self.fail(error)
        self.withdrawn(1)

    def row_failed(self, request: Request, error: RowError) -> None:
        try:
            self.write_error(request.index, (request.sample,), {}, request.prepared, error)
        except Exception as problem:  # noqa: BLE001 - raised again by whoever awaits ``failure``
            self.fail(problem)
        self.withdrawn(1)

    def broke(self, error: BaseException) -> None:
        if not isinstance(error, asyncio.CancelledError):
            self.fail(error)
        self.withdrawn(1)

    # What the feeder and the post-processor tell.

    def write_dropped(self, index: int, samples: tuple[int, ...]) -> None:
        for sample in samples:
            self.write(index, sample, State.DROPPED, dropped_line(index, sample))

    def write_error(
        self,
        index: int,
        samples: tuple[int, ...],
        fields: dict[str, Any],
        prepared: Prepared | None,
        error: RowError,
    ) -> None:
        document = self.errors.document(error)
        for sample in samples:
            record = error_record(index, sample, fields, prepared, document)
            self.write_failed(record)

    def write_failed(self, record: Mapping[str, Any]) -> None:
        """An error row, as records.py makes it."""
        line = encode(record) + b"\n"
        self.write(record["index"], record["sample"], State.ERROR, line)
        if self.on_error is not None:
            self.on_error(record)

    def write(self, index: int, sample: int, state: State, line: bytes) -> None:
        """Enter a line into the journal and the ledger."""
        slot = self.ledger.slot(index, sample)
        assert slot is not None
        self.ledger.set(slot, state, self.journal.append(line), len(line))
        self.journal.schedule()
