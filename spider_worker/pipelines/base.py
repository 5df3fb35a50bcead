"""What a pipeline is, and the narrow window through which it sees the fleet.

A pipeline knows nothing of Celery, Redis or other workers. It plans a job into units,
runs one unit at a time (several may overlap in one runner), publishes and finalises;
everything outside goes through the context it is given. The runner builds contexts
over the real fleet; ``spider_worker.testing`` ships one that needs no fleet.
"""

from __future__ import annotations

__all__ = [
    "COUNTERS",
    "Counters",
    "JobContext",
    "JobResult",
    "Pipeline",
    "Plan",
    "Resources",
    "ShardFile",
    "UnitContext",
    "UnitKind",
    "UnitOutcome",
    "UnitSpec",
]

import dataclasses
import enum
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from typing_extensions import TypeVar

from spider_sdk.config.model import Job, JobConfig

T = TypeVar("T")
J_co = TypeVar("J_co", bound=Job, default=JobConfig, covariant=True)
J_contra = TypeVar("J_contra", bound=Job, default=JobConfig, contravariant=True)

Counters = dict[str, float]

COUNTERS: Final = (
    "rows_total",  # set by the plan; absent while unknown
    "rows_done",  # records that exist: ok + errors + dropped, once a sample
    "rows_ok",
    "rows_error",
    "rows_dropped",  # a processor returned None
    "rows_cached",  # of rows_done: taken over from an earlier attempt
    "prompt_tokens",
    "completion_tokens",
    "cost_usd",  # absent while a price is unknown
    "completions_unpriced",  # completions whose endpoint reported no usage: no total is known
)
"""Names that every pipeline uses for the same thing. A unit reports its own cumulative
values; the fleet sums them over units into the job's ``metrics``. A row of a SWE job is an
instance, and its ``cost_usd`` never falls: what an attempt spent is spent. Under a cap on money it
counts an attempt whose cost is unknown with all that it was allowed. The fleet itself adds
``units_skipped``, those that were not begun for lack of budget."""


class UnitKind(enum.StrEnum):
    PLAN = "plan"  #: once a job, first
    WORK = "work"  #: a shard of rows, an agent instance, a training run
    PUBLISH = "publish"  #: at most one at a time, between and beside work units
    FINALISE = "finalise"  #: once every work unit is committed and no publication runs


@dataclasses.dataclass(frozen=True)
class UnitSpec:
    """A unit to be added. ``id`` is unique in the job and stable over replanning (so a
    plan that ran twice adds nothing twice); ``number`` orders work units from 0;
    ``spec`` is JSON that only the pipeline reads."""

    id: str
    number: int
    spec: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """``rows_total`` None: unknown (streaming). ``publish_every`` 0: only at the end."""

    units: Sequence[UnitSpec]
    rows_total: int | None = None
    publish_every: int = 0
    publishes: bool = False


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """The committed file of a work unit, as the manifest names it. ``version`` differs
    between contents; ``complete`` is False for what a cancelled unit left."""

    unit: str
    number: int
    path: Path
    version: str
    complete: bool
    counters: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class UnitOutcome:
    """How a unit ended. ``file`` is a finished file under ``UnitContext.scratch``
    that the runner moves into the artifacts and commits (None: nothing to keep); ``complete``
    False when the unit stopped early on cancel. ``publishable`` is what counts towards
    ``publish_every``. ``files`` are further artifacts by name."""

    counters: Counters
    file: Path | None = None
    complete: bool = True
    publishable: int = 0
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class JobResult:
    """What finalising found. ``remote_artifact`` is a Hub URL or None; ``error`` fails
    the job with that message (for instance: no good row at all); ``files`` are artifacts."""

    remote_artifact: str | None = None
    error: str | None = None
    message: str = ""
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)


class Resources(Protocol):
    """Things a runner keeps between units, and an engine even between jobs."""

    async def get(
        self,
        key: str,
        build: Callable[[], Awaitable[T]],
        close: Callable[[T], Awaitable[None]],
        *,
        outlives_job: bool = False,
    ) -> T:
        """The resource of that key, built on first use (once, however many ask)."""


class JobContext(Protocol[J_co]):
    """What ``plan``, ``publish`` and ``finalise`` see of a job of type ``J_co``."""

    @property
    def job_id(self) -> str: ...

    @property
    def job(self) -> J_co: ...

    @property
    def document(self) -> Mapping[str, Any]:
        """The job as submitted, without secrets."""

    @property
    def secrets(self) -> Mapping[str, str]:
        """The job's ``env``; also in ``os.environ`` while the job runs here."""

    @property
    def resources(self) -> Resources: ...

    @property
    def scratch(self) -> Path:
        """A folder of this attempt's own, on the file system of the artifacts."""

    def input_path(self, sha256: str) -> Path:
        """The uploaded input with that hash. Raises FatalJobError if it is missing."""

    def shards(self) -> list[ShardFile]:
        """Committed work units, by number."""

    def artifact(self, name: str) -> Path | None:
        """Where the committed artifact of that name lies, or None. Not to be written to."""

    def load_state(self) -> dict[str, Any]:
        """JSON kept for this kind of unit by ``save_state`` (e.g. what is published)."""

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Durable, under the fence. Raises LeaseLost."""

    def event(
        self, level: str, code: str, message: str, data: Mapping[str, Any] | None = None
    ) -> None:
        """Say something to whoever follows the job. Rows never ride in events."""

    @property
    def cancelled(self) -> bool:
        """The job is to stop: return soon, with what there is."""

    async def wait_cancelled(self) -> None: ...


class UnitContext(JobContext[J_co], Protocol[J_co]):
    """What ``run`` sees in addition."""

    @property
    def unit(self) -> UnitSpec: ...

    @property
    def grant(self) -> float | None:
        """US dollars that this attempt may spend, on top of what earlier ones of its unit did;
        None where the job has no budget."""

    @property
    def life(self) -> int:
        """How often the job had been retried when this attempt was claimed."""

    def previous(self) -> Sequence[Path]:
        """Journals and shards that earlier attempts of this unit left, oldest first.
        The last line of one may be torn."""

    def open_journal(self) -> Path:
        """The path of this attempt's journal, already holding whatever was copied to it.

        Append whole lines only; what is in the file survives the process. Call
        ``publish_journal`` once the rows taken over from ``previous`` are in it.
        """

    def publish_journal(self) -> None:
        """Register the journal under the fence; from here on readers and the next
        attempt use it instead of its predecessors. Raises LeaseLost."""

    def keep(
        self,
        files: Mapping[str, Path],
        state: Mapping[str, Any],
        *,
        drop: Sequence[str] = (),
    ) -> None:
        """Commit files while the unit runs (checkpoints): each ``files[name]``, a finished file
        under ``scratch``, is moved into the artifacts and named there, artifacts in ``drop``
        are named no longer, and ``state`` takes the place of what ``save_state`` saved, all in
        one step under the fence. Blocks. Raises LeaseLost."""

    def progress(self, counters: Counters, data: Mapping[str, Any] | None = None) -> None:
        """Report this unit's cumulative counters. Cheap: coalesced to two a second."""

    def draining(self) -> None:
        """All of this unit's requests are issued: the runner may start another unit
        beside it, so that the engine stays full."""

    def add_units(self, units: Sequence[UnitSpec]) -> None:
        """Append units to the job (streaming sources); known ids are ignored."""


class Pipeline(Protocol[J_contra]):
    """Contract of every pipeline of jobs of type ``J_contra``. An instance serves one job in one
    runner."""

    grace: float  #: seconds it may take to return after a cancel

    async def plan(self, ctx: JobContext[J_contra]) -> Plan:
        """Check everything that can be known before the first row, then cut the job."""

    async def run(self, ctx: UnitContext[J_contra]) -> UnitOutcome:
        """Run one unit. FatalJobError fails the job; anything else is a failed attempt."""

    async def publish(self, ctx: JobContext[J_contra]) -> None:
        """Push what is committed and not yet published. One at a time over the fleet."""

    async def finalise(self, ctx: JobContext[J_contra]) -> JobResult:
        """Publish the rest, write the summary. Idempotent."""
