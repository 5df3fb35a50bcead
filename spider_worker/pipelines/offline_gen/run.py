"""Running one unit: take over, feed, wait, post-process, cut the shard."""

from __future__ import annotations

__all__ = ["GRACE", "UnitRun", "Workbench"]

import asyncio
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Final

from spider_sdk.config.model import Pricing
from spider_worker.pipelines.base import UnitContext, UnitOutcome
from spider_worker.pipelines.calls import Announcer, persist
from spider_worker.pipelines.offline_gen.feeder import Feeder
from spider_worker.pipelines.offline_gen.journal import Journal
from spider_worker.pipelines.offline_gen.ledger import Ledger, State
from spider_worker.pipelines.offline_gen.planning import Rows, stream_unit
from spider_worker.pipelines.offline_gen.pool import RequestPool
from spider_worker.pipelines.offline_gen.post import Backlog, PostStage
from spider_worker.pipelines.offline_gen.records import ErrorText
from spider_worker.pipelines.offline_gen.resume import Takeover, take_over
from spider_worker.pipelines.offline_gen.shard import write_shard
from spider_worker.pipelines.offline_gen.tally import Tally
from spider_worker.pipelines.offline_gen.unit import UnitRows
from spider_worker.pipelines.rows.reader import Reader
from spider_worker.sandbox.base import Sandbox

GRACE: Final = 5.0  #: seconds from a cancel to the return of ``run``
_LAST_ANSWERS: Final = 3.0  #: of these, for requests in flight to be answered
_TICK: Final = 0.5  #: seconds between reports
_ERRORS_TOLD: Final = 5  #: kinds of row errors that a runner sends an event for
_ERROR_LENGTH: Final = 300  #: characters of an error in an event


@dataclasses.dataclass(frozen=True)
class Workbench:
    """What units of one job share in a runner."""

    pool: RequestPool
    reader: Reader
    feeder: Feeder
    post: Sandbox | None
    backlog: Backlog
    errors: ErrorText
    told: set[tuple[str, str]]  #: stage and type of errors that an event told of
    pricing: Pricing
    samples: int


class UnitRun:
    """One attempt of one unit."""

    def __init__(self, ctx: UnitContext, bench: Workbench) -> None:
        self._ctx = ctx
        self._bench = bench
        self._announcer = Announcer(ctx)
        self._span = Rows.from_spec(ctx.unit.spec)
        self._post = PostStage(bench.post, bench.backlog) if bench.post else None

    async def execute(self) -> UnitOutcome:
        """Raises FatalJobError to fail the job, anything else for a failed attempt."""
        ledger = Ledger(self._span.start, self._span.stop, self._bench.samples)
        journal = Journal(self._ctx.open_journal())
        try:
            taken = await self._take_over(ledger, journal)
            await persist(self._ctx.publish_journal)
            self._announce(taken)
            tally = Tally(ledger, self._bench.pricing, taken.spent)
            on_pending = self._post.add if self._post else None
            rows = UnitRows(ledger, journal, tally, self._bench.errors, on_pending)
            rows.on_error = self._tell_error
            journal.on_error = rows.fail
            complete = await self._work(rows, taken)
            path = self._ctx.scratch / f"{self._ctx.unit.number:05d}.jsonl"
            journal.flush()
            await asyncio.to_thread(write_shard, journal, ledger, path, complete=complete)
        finally:
            journal.close()
        await self._announcer.finish()
        counters = tally.counters()
        self._ctx.progress(counters, self._activity())
        return UnitOutcome(
            counters=counters, file=path, complete=complete, publishable=ledger.count(State.OK)
        )

    async def _take_over(self, ledger: Ledger, journal: Journal) -> Takeover:
        ctx = self._ctx
        previous = [path for path in await persist(ctx.previous) if path != journal.path]
        shards = await persist(ctx.shards)
        committed = next((shard for shard in shards if shard.unit == ctx.unit.id), None)
        priced = None not in dataclasses.astuple(self._bench.pricing)
        return await asyncio.to_thread(
            take_over, previous, committed, ledger, journal, priced=priced
        )

    def _announce(self, taken: Takeover) -> None:
        if taken.broken:
            self._announcer.say(
                "warning",
                "rows.unreadable",
                f"{taken.broken} lines of earlier attempts of {self._ctx.unit.id} could not be"
                " read; their rows are run again",
                {"unit": self._ctx.unit.id, "lines": taken.broken},
            )

    def _tell_error(self, record: Mapping[str, Any]) -> None:
        """Say the first few different errors while the job runs; the rest is in the records."""
        error = record["error"]
        kind = (str(error["stage"]), str(error["type"]))
        told = self._bench.told
        if kind in told or len(told) >= _ERRORS_TOLD:
            return
        told.add(kind)
        message = error["message"][:_ERROR_LENGTH]
        if not message.startswith(kind[1]):  # an exception's name begins its text already
            message = f"{kind[1]}: {message}"
        text = f"row {record['id']}: {kind[0]}: {message}"
        data = {"unit": self._ctx.unit.id, "stage": kind[0], "type": kind[1]}
        self._announcer.say("warning", "row.error", text, data)

    async def _work(self, rows: UnitRows, taken: Takeover) -> bool:
        """Run what is missing; False when a cancel came first."""
        if self._post:
            for slot in rows.ledger.slots(State.PENDING):
                self._post.add(slot)
        work = asyncio.create_task(self._rows(rows, taken))
        cancelled = asyncio.create_task(self._ctx.wait_cancelled())
        ticker = asyncio.create_task(self._report(rows))
        try:
            await asyncio.wait([work, cancelled, rows.failure], return_when=asyncio.FIRST_COMPLETED)
            if rows.failure.done():
                rows.failure.result()
            if work.done():
                work.result()
                return True
            await self._wind_down(rows, work)
            return False
        finally:
            self._bench.pool.withdraw(rows)
            self._bench.pool.abandon(rows)
            await _end(work, cancelled, ticker)
            if self._post is not None:
                self._post.abandon()
            if not rows.failure.cancel():
                rows.failure.exception()  # raised above, or late: the unit ended another way

    async def _rows(self, rows: UnitRows, taken: Takeover) -> None:
        post = asyncio.create_task(self._post.run(rows)) if self._post else None
        try:
            feeding = asyncio.create_task(self._feed(rows, taken))
            try:
                # Post-processing that breaks must not wait for the source to end.
                await asyncio.wait(
                    [feeding, *([post] if post else [])], return_when=asyncio.FIRST_COMPLETED
                )
                if post is not None and post.done():
                    post.result()
                await feeding
            finally:
                await _end(feeding)
            if post is not None and self._post is not None:
                answered = asyncio.create_task(rows.answered())
                await asyncio.wait([answered, post], return_when=asyncio.FIRST_COMPLETED)
                await _end(answered)
                self._post.close()
                await post
            else:
                await rows.answered()
        finally:
            if post is not None:
                await _end(post)

    async def _feed(self, rows: UnitRows, taken: Takeover) -> None:
        stream = self._span.stream
        await self._bench.feeder.feed(rows, self._bench.pool, stream=stream)
        if stream:
            await self._go_on(rows.journal, taken)
        if self._post is not None:
            await self._bench.backlog.short()
        self._ctx.draining()

    async def _go_on(self, journal: Journal, taken: Takeover) -> None:
        """Add the unit after this one, if the data does not end here."""
        number, stop = self._ctx.unit.number + 1, self._span.stop
        known = taken.fed or any(
            shard.number == number for shard in await persist(self._ctx.shards)
        )
        if known or await self._bench.reader.goes_on_at(stop):
            unit = stream_unit(number, stop, stop - self._span.start)
            await persist(functools.partial(self._ctx.add_units, [unit]))
            journal.fed()

    async def _wind_down(self, rows: UnitRows, work: asyncio.Task[None]) -> None:
        """Issue nothing more, and let what is in flight be answered for a moment."""
        pool = self._bench.pool
        await _end(work)
        rows.withdrawn(pool.withdraw(rows))
        answered = asyncio.create_task(rows.answered())
        await asyncio.wait(
            [answered, rows.failure],
            timeout=_LAST_ANSWERS,
            return_when=asyncio.FIRST_COMPLETED,
        )
        pool.abandon(rows)
        await _end(answered)
        if rows.failure.done():
            rows.failure.result()

    async def _report(self, rows: UnitRows) -> None:
        while True:
            self._ctx.progress(rows.tally.counters(), self._activity())
            await asyncio.sleep(_TICK)

    def _activity(self) -> dict[str, Any]:
        """``in_flight``, ``waiting`` (for a retry) and ``limit`` of the runner now; ``throttled``
        and ``retries`` so far."""
        pool = self._bench.pool
        stats = pool.engine.stats()  # rows that wait for a retry are not in flight
        return {
            "unit": self._ctx.unit.id,
            "in_flight": stats.in_flight,
            "limit": min(pool.limit, stats.limit),
            "throttled": stats.throttled,
            "retries": stats.retries,
            "waiting": stats.waiting,
        }


async def _end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait for their end. A task that had already failed was heard by whoever
    awaited it before; one that fails while it is being given up has nobody to tell."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
