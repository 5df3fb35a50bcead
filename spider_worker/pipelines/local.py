"""A job without a fleet: one process, one folder.

``LocalStore`` keeps what the fleet would (units, journals, shards, states, artifacts) as files, so
that a job goes on in another process where this one ended. ``run_job_locally`` drives a
pipeline through a job's life the way a runner does, units overlapping.
"""

from __future__ import annotations

__all__ = ["LocalContext", "LocalResources", "LocalResult", "LocalStore", "run_job_locally"]

import asyncio
import dataclasses
import json
import os
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic

from typing_extensions import TypeVar

from spider_sdk.config.model import Job, JobConfig
from spider_sdk.errors import FatalJobError, JobCancelled, UsageError
from spider_sdk.records import Record
from spider_worker.pipelines.base import (
    Counters,
    JobResult,
    Pipeline,
    ShardFile,
    UnitOutcome,
    UnitSpec,
)

T = TypeVar("T")
J = TypeVar("J", bound=Job, default=JobConfig)
EventSink = Callable[[str, str, str, Mapping[str, Any]], None]


class LocalResources:
    """Resources of one process. ``close`` ends all, the last made first."""

    def __init__(self) -> None:
        self._made: dict[str, asyncio.Task[Any]] = {}
        self._closers: dict[str, Callable[[Any], Awaitable[None]]] = {}

    async def get(
        self,
        key: str,
        build: Callable[[], Awaitable[T]],
        close: Callable[[T], Awaitable[None]],
        *,
        outlives_job: bool = False,  # noqa: ARG002 - the process ends with its job
    ) -> T:
        if key not in self._made:
            self._made[key] = asyncio.ensure_future(build())
            self._closers[key] = close
        task = self._made[key]
        try:
            return await asyncio.shield(task)
        except BaseException:
            if task.done():  # so that the next one to ask builds it anew
                self._made.pop(key, None)
            raise

    async def close(self) -> None:
        for key, task in reversed(list(self._made.items())):
            value = (await asyncio.gather(task, return_exceptions=True))[0]
            if not isinstance(value, BaseException):
                await self._closers[key](value)
        self._made.clear()


class LocalStore:
    """What the fleet would keep of a job, under ``root``. One process at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("units", "scratch", "artifacts"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self._file = root / "state.json"
        self._lock = threading.RLock()  # pipelines call from threads too
        self._state: dict[str, Any] = {
            "planned": False, "units": {}, "state": {}, "attempts": 0, "publish_every": 0,
            "publishes": False, "rows_total": None, "life": 0,
        }  # fmt: skip
        if self._file.is_file():
            self._state |= json.loads(self._file.read_text(encoding="utf-8"))

    @property
    def units(self) -> dict[str, dict[str, Any]]:
        """By id: ``number``, ``spec``, ``journal`` (name or None), ``shard`` (or None), ``open``
        (still to be run)."""
        units: dict[str, dict[str, Any]] = self._state["units"]
        return units

    def __getitem__(self, name: str) -> Any:
        return self._state[name]

    def update(self, **values: Any) -> None:
        with self._lock:
            self._state.update(values)
            self.save()

    def save(self) -> None:
        with self._lock:
            temporary = self._file.with_suffix(".new")
            temporary.write_text(json.dumps(self._state), encoding="utf-8")
            temporary.replace(self._file)

    def new_attempt(self) -> int:
        self._state["attempts"] += 1
        self.save()
        return int(self._state["attempts"])

    def add_units(self, units: Sequence[UnitSpec]) -> None:
        with self._lock:
            for unit in units:
                entry = {"number": unit.number, "spec": dict(unit.spec), "journal": None}
                self.units.setdefault(unit.id, {**entry, "shard": None, "open": True})
            self.save()

    def reopen(self) -> None:
        """Have units that lack rows, or hold error rows, run again (``retry``)."""
        self._state["life"] += 1
        for entry in self.units.values():
            shard = entry["shard"]
            if shard and (not shard["complete"] or shard["counters"].get("rows_error")):
                entry["open"] = True
        self.save()

    def shards(self) -> list[ShardFile]:
        shards = [
            ShardFile(
                unit, entry["number"], self.root / "units" / entry["shard"]["path"],
                entry["shard"]["path"], entry["shard"]["complete"], entry["shard"]["counters"],
            )
            for unit, entry in self.units.items()
            if entry["shard"]
        ]  # fmt: skip
        return sorted(shards, key=lambda shard: shard.number)

    def commit(self, unit: str, attempt: int, outcome: UnitOutcome) -> None:
        """Move a unit's file to its place and name it; its journal is not needed any more."""
        entry = self.units[unit]
        if outcome.file is not None:
            name = f"{unit}.{attempt}.jsonl"
            outcome.file.replace(self.root / "units" / name)
            counters = dict(outcome.counters)
            entry["shard"] = {"path": name, "complete": outcome.complete, "counters": counters}
        journal, entry["journal"] = entry["journal"], None
        entry["open"] = not outcome.complete
        self.keep(outcome.files)
        self.save()
        if journal is not None:
            (self.root / "units" / journal).unlink()

    def keep(self, files: Mapping[str, Path]) -> None:
        for name, path in files.items():
            target = self.root / "artifacts" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)


class LocalContext(Generic[J]):
    """A UnitContext (and a JobContext, where ``unit`` is None) over a LocalStore.

    ``events`` collects ``(level, code, message, data)``; ``reports`` the last counters and data
    of ``progress``. ``cancel`` stops the job. ``grant`` is each attempt's, since nobody counts a
    budget here.
    """

    def __init__(
        self,
        store: LocalStore,
        job: J,
        *,
        document: Mapping[str, Any] | None = None,
        secrets: Mapping[str, str] | None = None,
        inputs: Mapping[str, Path] | None = None,
        resources: LocalResources | None = None,
        job_id: str = "local",
        unit: UnitSpec | None = None,
        parent: LocalContext[J] | None = None,
        on_event: EventSink | None = None,
        grant: float | None = None,
    ) -> None:
        self.store = store
        self.job = job
        self.job_id = job_id
        self.document: Mapping[str, Any] = document or {}
        self.secrets: Mapping[str, str] = secrets or {}
        self.resources = resources or LocalResources()
        self.inputs = inputs or {}
        self.on_event = on_event
        self.grant = grant
        self.events: list[tuple[str, str, str, Mapping[str, Any]]] = []
        self.reports: dict[str, tuple[Counters, Mapping[str, Any]]] = {}
        self.drained = asyncio.Event()
        self._unit = unit
        self._cancel = asyncio.Event()
        if parent is not None:
            self._cancel, self.events, self.reports = parent._cancel, parent.events, parent.reports
        self.attempt = store.new_attempt()
        self.scratch = store.root / "scratch" / str(self.attempt)
        self.scratch.mkdir()

    def for_unit(self, unit: UnitSpec | None) -> LocalContext[J]:
        """A context of an attempt of its own at that unit, in the same job and process."""
        return LocalContext(
            self.store, self.job, document=self.document, secrets=self.secrets,
            inputs=self.inputs, resources=self.resources, job_id=self.job_id, unit=unit,
            parent=self, on_event=self.on_event, grant=self.grant,
        )  # fmt: skip

    @property
    def life(self) -> int:
        return int(self.store["life"])

    @property
    def unit(self) -> UnitSpec:
        if self._unit is None:
            raise UsageError("this context belongs to no unit")
        return self._unit

    def input_path(self, sha256: str) -> Path:
        if sha256 not in self.inputs:
            raise FatalJobError(f"input {sha256} is missing")
        return self.inputs[sha256]

    def shards(self) -> list[ShardFile]:
        return self.store.shards()

    def load_state(self) -> dict[str, Any]:
        return dict(self.store["state"])

    def save_state(self, state: Mapping[str, Any]) -> None:
        self.store.update(state=dict(state))

    def artifact(self, name: str) -> Path | None:
        path = self.store.root / "artifacts" / name
        return path if path.is_file() else None

    def keep(
        self,
        files: Mapping[str, Path],
        state: Mapping[str, Any],
        *,
        drop: Sequence[str] = (),
    ) -> None:
        self.store.keep(files)
        self.save_state(state)
        for name in drop:
            (self.store.root / "artifacts" / name).unlink(missing_ok=True)

    def event(
        self, level: str, code: str, message: str, data: Mapping[str, Any] | None = None
    ) -> None:
        self.events.append((level, code, message, data or {}))
        if self.on_event is not None:
            self.on_event(level, code, message, data or {})

    @property
    def cancelled(self) -> bool:
        return self._cancel.is_set()

    async def wait_cancelled(self) -> None:
        await self._cancel.wait()

    def cancel(self) -> None:
        self._cancel.set()

    def previous(self) -> list[Path]:
        entry = self.store.units[self.unit.id]
        names = [entry["shard"]["path"] if entry["shard"] else None, entry["journal"]]
        return [self.store.root / "units" / name for name in names if name]

    def open_journal(self) -> Path:
        return self.store.root / "units" / f"{self.unit.id}.{self.attempt}.journal"

    def publish_journal(self) -> None:
        self.store.units[self.unit.id]["journal"] = self.open_journal().name
        self.store.save()

    def progress(self, counters: Counters, data: Mapping[str, Any] | None = None) -> None:
        self.reports[self.unit.id] = (counters, data or {})

    def draining(self) -> None:
        self.drained.set()

    def add_units(self, units: Sequence[UnitSpec]) -> None:
        self.store.add_units(units)


@dataclasses.dataclass(frozen=True)
class LocalResult:
    """``records`` reads the job's records from its shards, in order."""

    result: JobResult
    store: LocalStore

    def records(self) -> list[Record]:
        found: list[Record] = []
        for shard in self.store.shards():
            with shard.path.open("rb") as file:
                found.extend(json.loads(line) for line in file if line.startswith(b'{"id":'))
        return found

    def counters(self) -> Counters:
        sums: Counters = {}
        for shard in self.store.shards():
            for name, value in shard.counters.items():
                sums[name] = sums.get(name, 0) + value
        return sums


async def run_job_locally(
    pipeline: Pipeline[J], ctx: LocalContext[J], *, retry: bool = False, overlap: int = 2
) -> LocalResult:
    """Plan, work, publish and finalise, going on where the store was left.

    ``retry`` runs missing and errored rows of units that are committed. At most ``overlap`` units
    are at work at once, the next one begun when those before it drain. The context's resources
    are closed at the end. Raises FatalJobError and whatever else fails an attempt, and
    JobCancelled once the units at work have left what they have.
    """
    store = ctx.store
    try:
        if not store["planned"]:
            plan = await pipeline.plan(ctx)
            store.add_units(plan.units)
            store.update(
                planned=True, rows_total=plan.rows_total, publishes=plan.publishes,
                publish_every=plan.publish_every,
            )  # fmt: skip
        if retry:
            store.reopen()
        await _Work(pipeline, ctx, overlap).run()
        if ctx.cancelled:
            raise JobCancelled
        result = await pipeline.finalise(ctx)
        store.keep(result.files)
        return LocalResult(result, store)
    finally:
        await ctx.resources.close()


class _Work(Generic[J]):
    """Open units, by number, the next one started when the last one drains."""

    def __init__(self, pipeline: Pipeline[J], ctx: LocalContext[J], overlap: int) -> None:
        self._pipeline = pipeline
        self._ctx = ctx
        self._overlap = overlap
        self._running: dict[asyncio.Task[None], LocalContext[J]] = {}
        self._unpublished = 0

    async def run(self) -> None:
        started: set[str] = set()
        try:
            while True:
                unit = None if self._ctx.cancelled else self._next(started)
                if unit is not None and self._may_start():
                    started.add(unit.id)
                    child = self._ctx.for_unit(unit)
                    self._running[asyncio.create_task(self._unit(child))] = child
                elif self._running:
                    await self._wait()
                else:
                    return
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    def _next(self, started: set[str]) -> UnitSpec | None:
        units = self._ctx.store.units
        waiting = [u for u, entry in units.items() if entry["open"] and u not in started]
        if not waiting:
            return None
        first = min(waiting, key=lambda unit: units[unit]["number"])
        return UnitSpec(first, units[first]["number"], units[first]["spec"])

    def _may_start(self) -> bool:
        return len(self._running) < self._overlap and all(
            child.drained.is_set() for child in self._running.values()
        )

    async def _wait(self) -> None:
        drains = [
            asyncio.create_task(child.drained.wait())
            for child in self._running.values()
            if not child.drained.is_set()
        ]
        try:
            await asyncio.wait([*self._running, *drains], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for drain in drains:
                drain.cancel()
            await asyncio.gather(*drains, return_exceptions=True)
        for task in [task for task in self._running if task.done()]:
            del self._running[task]
            task.result()

    async def _unit(self, child: LocalContext[J]) -> None:
        outcome = await self._pipeline.run(child)
        store = self._ctx.store
        store.commit(child.unit.id, child.attempt, outcome)
        self._unpublished += outcome.publishable
        every = store["publish_every"]
        if store["publishes"] and every and self._unpublished >= every:
            self._unpublished = 0
            await self._pipeline.publish(self._ctx)
