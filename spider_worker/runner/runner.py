"""The runner's loop: asks for units, runs them, commits what they made under their fence."""

from __future__ import annotations

__all__ = ["Runner"]

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from spider_sdk.config import parse_job
from spider_sdk.config.model import SweConfig
from spider_sdk.errors import FatalJobError, FleetUnavailable, LeaseLost, SpiderError
from spider_worker.control import Message, redact, send
from spider_worker.fleet import ArtifactEntry, Caps, Claim, Fleet
from spider_worker.pipelines.base import UnitKind
from spider_worker.pipelines.registry import build_pipeline
from spider_worker.runner.context import ClaimContext, JobSession
from spider_worker.runner.resources import ResourceCache
from spider_worker.runner.watchdog import Watchdog
from spider_worker.settings import WorkerSettings

T = TypeVar("T")

logger = logging.getLogger(__name__)

MAIN_KINDS = (UnitKind.PLAN, UnitKind.WORK, UnitKind.FINALISE)
PUBLISH_KINDS = (UnitKind.PUBLISH,)
#: Most hints published when a job is planned; workers that come later are hinted by the reaper.
MAX_HINTS = 32
#: Seconds between attempts to reach Redis for a commit; the watchdog bounds how long.
PERSIST_PAUSE = 0.2


@dataclasses.dataclass
class _Running:
    context: ClaimContext
    task: asyncio.Task[None]
    draining: bool = False

    @property
    def has_room(self) -> bool:
        """May another unit start beside this one? Not beside one whose last attempt broke: if
        it breaks again, it shall be known which one it was."""
        claim = self.context.claim
        return claim.kind == UnitKind.PUBLISH or (self.draining and claim.attempts == 1)


class Runner:
    """One process, one event loop, one job at a time, several of its units at once."""

    def __init__(self, fleet: Fleet, settings: WorkerSettings, report: int) -> None:
        self._fleet = fleet
        self._settings = settings
        self._report = report
        self._resources = ResourceCache()
        self._session: JobSession | None = None
        self._running: dict[tuple[str, int], _Running] = {}
        self._asking: set[tuple[str, ...]] = set()
        self._suspect = False
        self._covered: dict[str, str | None] = {}
        self._stopped = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None

    async def main(self, watchdog: Watchdog) -> None:
        """Serve the supervisor until it says stop."""
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        watchdog.start(lambda message: loop.call_soon_threadsafe(inbox.put_nowait, message))
        while not self._stopped.is_set():
            message = await inbox.get()
            await self._on_message(message)
        await self._end_session()
        await self._resources.close(job_only=False)

    async def _on_message(self, message: Message) -> None:
        match message["op"]:
            case "beat":
                self._tell("alive")
            case "unit":
                self._asking.discard(tuple(message.get("kinds", ())))
                await self._begin(Claim.from_json(message["claim"]), message.get("job"))
            case "none":
                self._asking.discard(tuple(message["kinds"]))
                await self._maybe_idle()
            case "cancel":
                self._cancel()
            case "lost":
                running = self._running.get((message["unit"], message["fence"]))
                if running is not None:
                    running.task.cancel()
            case "stop":
                await self._give_all_back()
                self._stopped.set()

    async def _begin(self, claim: Claim, job: dict[str, Any] | None) -> None:
        """Start a unit's task. This is the boundary at which whatever is wrong with a job as
        stored, or with the parts that it asks for, becomes its failure."""
        try:
            if self._session is None or self._session.job_id != claim.job_id:
                assert job is not None, "the first unit of a job comes with the job"
                await self._end_session()
                self._session = self._open_session(claim.job_id, job)
        except Exception as error:
            if isinstance(error, SpiderError):
                why = error.message
            else:
                logger.exception("%s cannot be begun", claim.job_id)
                why = f"the job cannot be begun: {type(error).__name__}: {error}"
            fail = functools.partial(self._fleet.units.fail, fatal=True)
            await self._end_claim(claim, fail, redact(why, (job or {}).get("secrets") or {}))
            self._tell("ended", unit=claim.unit, fence=claim.fence)
            await self._maybe_idle()
            return
        context = ClaimContext(self._fleet, self._session, claim, self._on_draining)
        task = asyncio.create_task(self._run(context), name=claim.unit)
        self._running[claim.unit, claim.fence] = _Running(context, task)
        # Its first step, before the next message: a task that is cancelled before it has begun
        # never reaches the end of its claim, and whoever waits for that waits for ever.
        await asyncio.sleep(0)

    def _open_session(self, job_id: str, job: dict[str, Any]) -> JobSession:
        config = parse_job(job["document"])
        pipeline = build_pipeline(config, self._settings)
        session = JobSession(
            job_id=job_id,
            job=config,
            document=job["document"],
            secrets=job["secrets"],
            pipeline=pipeline,
            resources=self._resources,
            cancelled=asyncio.Event(),
        )
        self._tell("grace", seconds=pipeline.grace)
        # A runner serves several jobs: what the operator set under these names comes back.
        self._covered = {name: os.environ.get(name) for name in job["secrets"]}
        try:
            os.environ.update(job["secrets"])
        except BaseException:
            self._uncover()
            raise
        return session

    async def _end_session(self) -> None:
        """Forget the job: its resources, its secrets. Engines stay."""
        if self._session is None:
            return
        await self._resources.close(job_only=not self._suspect)
        self._suspect = False
        self._uncover()
        self._session = None

    def _uncover(self) -> None:
        for name, value in self._covered.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    # -- one unit ----------------------------------------------------------------

    async def _run(self, context: ClaimContext) -> None:
        """Run a unit and end its claim, one way or another: this is the boundary at which
        whatever a pipeline raises becomes a word in the record."""
        claim = context.claim
        reporter = asyncio.create_task(self._report_progress(context))
        try:
            await self._run_kind(context)
            if claim.kind == UnitKind.WORK:
                self._fleet.artifacts.drop_scratch(claim)
        except asyncio.CancelledError:
            logger.info("%s was taken back", claim.unit)
            await self._tell_cost(context)
            await self._end_claim(claim, self._fleet.units.release, "its runner was stopped")
        except LeaseLost as error:
            logger.warning("%s", error)
        except FatalJobError as error:
            why = redact(error.message, context.secrets)
            await self._tell_cost(context)
            fail = functools.partial(self._fleet.units.fail, fatal=True, reason=_reason(error))
            await self._end_claim(claim, fail, why)
        except Exception as error:  # noqa: BLE001 (the boundary: any escape is a failed attempt)
            logger.error("%s failed\n%s", claim.unit, traceback.format_exc())
            # Whatever broke, an engine may have broken with it: none is kept, and no further
            # unit is asked for on top of it.
            self._suspect = True
            why = redact(f"{type(error).__name__}: {error}", context.secrets)
            await self._tell_cost(context)
            await self._end_claim(claim, self._fleet.units.fail, why)
        finally:
            reporter.cancel()
            del self._running[claim.unit, claim.fence]
            self._tell("ended", unit=claim.unit, fence=claim.fence)
            self._seek(after=claim)

    async def _tell_cost(self, context: ClaimContext) -> None:
        """Before an attempt ends without a commit: what it spent since its last report would be
        given out again."""
        if context.claim.kind == UnitKind.WORK and isinstance(context.job, SweConfig):
            with contextlib.suppress(LeaseLost):
                await self._persist(context.send_progress)

    async def _report_progress(self, context: ClaimContext) -> None:
        while True:
            try:
                await context.report_progress()
            except FleetUnavailable as error:
                logger.warning("progress waits for Redis: %s", error)
                await asyncio.sleep(PERSIST_PAUSE)
            except LeaseLost:
                running = self._running.get((context.claim.unit, context.claim.fence))
                if running is not None:
                    running.task.cancel()
                return

    async def _run_kind(self, context: ClaimContext) -> None:
        pipeline = self._require_session().pipeline
        match context.claim.kind:
            case UnitKind.PLAN:
                await self._plan(context)
            case UnitKind.WORK:
                await self._work(context)
            case UnitKind.PUBLISH:
                await pipeline.publish(context)
                await self._commit(context.claim, complete=True, counters={})
            case UnitKind.FINALISE:
                await self._finalise(context)

    async def _plan(self, context: ClaimContext) -> None:
        plan = await self._require_session().pipeline.plan(context)
        outcome = {
            "units": [[unit.id, unit.number, json.dumps(unit.spec)] for unit in plan.units],
            "publishes": plan.publishes,
            "publish_every": plan.publish_every,
        }
        if plan.rows_total is not None:
            outcome["rows_total"] = plan.rows_total
        await self._commit(context.claim, complete=True, counters={}, outcome=outcome)
        self._mirror(context.claim, [], rows_total=plan.rows_total)
        session = self._require_session()
        most = Caps.of(session.document).runners or MAX_HINTS
        helpers = min(len(plan.units), most, MAX_HINTS) - 1
        for _ in range(helpers):
            await asyncio.to_thread(
                self._fleet.hints.publish, session.job_id, session.job.queue.value
            )

    async def _work(self, context: ClaimContext) -> None:
        outcome = await self._require_session().pipeline.run(context)
        store, claim = self._fleet.artifacts, context.claim
        entries = []
        if outcome.file is not None:
            entries.append(
                await asyncio.to_thread(
                    store.adopt,
                    claim,
                    outcome.file,
                    name=f"shards/{claim.unit}.jsonl",
                    number=claim.number,
                    complete=outcome.complete,
                    counters=outcome.counters,
                )
            )
        entries += await self._adopt(claim, outcome.files)
        result: dict[str, Any] = {"complete": outcome.complete, "counters": outcome.counters}
        await self._commit(
            claim,
            publishable=outcome.publishable,
            manifest={entry.name: entry.to_text() for entry in entries},
            **result,
        )
        self._mirror(claim, entries, **result)

    async def _finalise(self, context: ClaimContext) -> None:
        result = await self._require_session().pipeline.finalise(context)
        entries = await self._adopt(context.claim, result.files)
        outcome = {
            "message": result.message or "completed",
            "error": redact(result.error or "", context.secrets),
            "remote": result.remote_artifact or "",
        }
        await self._commit(
            context.claim,
            complete=True,
            counters={},
            outcome=outcome,
            manifest={entry.name: entry.to_text() for entry in entries},
        )
        if not result.error:
            self._mirror(context.claim, entries, remote=result.remote_artifact)

    async def _adopt(self, claim: Claim, files: Mapping[str, Path]) -> list[ArtifactEntry]:
        return [
            await asyncio.to_thread(self._fleet.artifacts.adopt, claim, path, name=name)
            for name, path in files.items()
        ]

    def _mirror(self, claim: Claim, entries: list[ArtifactEntry], **outcome: object) -> None:
        try:
            self._fleet.artifacts.write_commit(claim, entries, **outcome)
        except OSError as error:
            # Committed all the same; the copy is for a day when Redis is lost.
            logger.error("no copy of the commit of %s: %s", claim.unit, error)

    async def _commit(self, claim: Claim, **fields: Any) -> None:
        await self._persist(functools.partial(self._fleet.units.commit, claim, **fields))

    async def _end_claim(self, claim: Claim, end: Callable[[Claim, str], None], why: str) -> None:
        with contextlib.suppress(LeaseLost):  # then its end is another's to write
            await self._persist(functools.partial(end, claim, why))

    async def _persist(self, write: Callable[[], T]) -> T:
        """Repeat a write while Redis is away. The watchdog ends us before the lease does."""
        while True:
            try:
                return await asyncio.to_thread(write)
            except FleetUnavailable as error:
                logger.warning("a commit waits for Redis: %s", error)
                await asyncio.sleep(PERSIST_PAUSE)

    # -- asking for more ---------------------------------------------------------

    def _on_draining(self, context: ClaimContext) -> None:
        running = self._running.get((context.claim.unit, context.claim.fence))
        if running is not None and not running.draining:
            running.draining = True
            self._seek(after=None)

    def _seek(self, after: Claim | None) -> None:
        """Ask for another unit when this runner could feed one, and for a publication when
        something was committed."""
        session = self._session
        if session is None or self._stopped.is_set():
            return
        if not session.cancelled.is_set() and not self._suspect:
            if all(r.has_room for r in self._live()):
                self._ask(MAIN_KINDS)
            publishing = any(r.context.claim.kind == UnitKind.PUBLISH for r in self._live())
            if after is not None and not publishing:
                self._ask(PUBLISH_KINDS)
        if not self._asking:
            self._ending = asyncio.create_task(self._maybe_idle())

    def _live(self) -> list[_Running]:
        return list(self._running.values())

    def _ask(self, kinds: tuple[str, ...]) -> None:
        if kinds not in self._asking:
            self._asking.add(kinds)
            self._tell("next", kinds=list(kinds))

    async def _maybe_idle(self) -> None:
        if not self._running and not self._asking:
            await self._end_session()
            self._tell("idle")

    # -- stopping ----------------------------------------------------------------

    def _cancel(self) -> None:
        if self._session is None:
            return
        self._session.cancelled.set()
        grace = self._session.pipeline.grace
        for running in self._live():
            if running.context.claim.kind == UnitKind.PLAN:
                running.task.cancel()  # it has nothing to finish, and may wait for a slow source
        tasks = [running.task for running in self._running.values()]
        asyncio.get_running_loop().call_later(grace, lambda: [task.cancel() for task in tasks])

    async def _give_all_back(self) -> None:
        tasks = [running.task for running in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _require_session(self) -> JobSession:
        assert self._session is not None
        return self._session

    def _tell(self, op: str, **fields: Any) -> None:
        send(self._report, op, **fields)


def _reason(error: FatalJobError) -> str:
    """``AuthError`` → ``auth_error``: a stable word for programs."""
    name = type(error).__name__
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
