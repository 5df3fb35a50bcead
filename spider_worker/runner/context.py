"""The pipeline's window to the fleet, for one claim."""

from __future__ import annotations

__all__ = ["ClaimContext", "JobSession"]

import asyncio
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spider_sdk.config.model import Job
from spider_sdk.errors import FatalJobError
from spider_worker.control import redact
from spider_worker.fleet import Claim, Fleet
from spider_worker.pipelines.base import Counters, Pipeline, Resources, ShardFile, UnitSpec

#: At most this many progress events a second and unit.
PROGRESS_RATE = 2.0


@dataclasses.dataclass
class JobSession:
    """What the claims of one job in this runner share."""

    job_id: str
    job: Job
    document: Mapping[str, Any]
    secrets: Mapping[str, str]
    pipeline: Pipeline[Any]
    resources: Resources
    cancelled: asyncio.Event


class ClaimContext:
    """A ``UnitContext`` over the real fleet. Called from the runner's event loop, or from a
    thread that the pipeline started; only progress and draining belong to the loop."""

    def __init__(self, fleet: Fleet, session: JobSession, claim: Claim, on_draining: Any) -> None:
        self._fleet = fleet
        self._session = session
        self.claim = claim
        self._on_draining = on_draining
        self._journal: Path | None = None
        self._pending: tuple[Counters, Mapping[str, Any]] | None = None
        self._wake = asyncio.Event()

    @property
    def job_id(self) -> str:
        return self._session.job_id

    @property
    def job(self) -> Any:
        """A ``Job`` of the type that the pipeline is for."""
        return self._session.job

    @property
    def document(self) -> Mapping[str, Any]:
        return self._session.document

    @property
    def secrets(self) -> Mapping[str, str]:
        return self._session.secrets

    @property
    def resources(self) -> Resources:
        return self._session.resources

    @property
    def scratch(self) -> Path:
        return self._fleet.artifacts.folder(self.job_id, "scratch", self.claim.stem)

    @property
    def unit(self) -> UnitSpec:
        return UnitSpec(self.claim.unit, self.claim.number, self.claim.spec)

    @property
    def grant(self) -> float | None:
        return self.claim.grant

    @property
    def life(self) -> int:
        return self.claim.life

    @property
    def cancelled(self) -> bool:
        return self._session.cancelled.is_set()

    async def wait_cancelled(self) -> None:
        await self._session.cancelled.wait()

    def input_path(self, sha256: str) -> Path:
        path = self._fleet.inputs.path(sha256)
        if not path.is_file():
            raise FatalJobError(f"the uploaded input {sha256} is not in the artifact store")
        return path

    def shards(self) -> list[ShardFile]:
        store = self._fleet.artifacts
        return [
            ShardFile(
                unit=entry.unit,
                number=entry.number or 0,
                path=store.path(entry),
                version=entry.version,
                complete=entry.complete,
                counters=entry.counters,
            )
            for entry in store.shards(self.job_id)
        ]

    def artifact(self, name: str) -> Path | None:
        found = self._fleet.artifacts.entries(self.job_id, (name,))
        return self._fleet.artifacts.path(found[0]) if found else None

    def keep(
        self,
        files: Mapping[str, Path],
        state: Mapping[str, Any],
        *,
        drop: Sequence[str] = (),
    ) -> None:
        store = self._fleet.artifacts
        discard = store.discard(self.job_id, drop) if drop else None
        entries = [store.adopt(self.claim, path, name=name) for name, path in files.items()]
        manifest = {entry.name: entry.to_text() for entry in entries}
        self._fleet.units.keep(self.claim, "pipeline", state, manifest=manifest, drop=drop)
        if discard is not None:
            discard()

    def load_state(self) -> dict[str, Any]:
        return self._fleet.units.load_state(self.job_id, "pipeline")

    def save_state(self, state: Mapping[str, Any]) -> None:
        self._fleet.units.save_state(self.claim, "pipeline", state)

    def event(
        self, level: str, code: str, message: str, data: Mapping[str, Any] | None = None
    ) -> None:
        self._fleet.units.event(
            self.claim, level, code, redact(message, self.secrets), self._redacted(data or {})
        )

    def previous(self) -> Sequence[Path]:
        names = (f"shards/{self.claim.unit}.jsonl", f"journal/{self.claim.unit}")
        found = self._fleet.artifacts.entries(self.job_id, names)
        return [self._fleet.artifacts.path(entry) for entry in found]

    def open_journal(self) -> Path:
        self._journal = self.scratch / "journal.jsonl"
        self._journal.touch()
        return self._journal

    def publish_journal(self) -> None:
        if self._journal is None:
            raise RuntimeError("publish_journal before open_journal")
        # What was copied from the predecessors must not be younger than its registration.
        descriptor = os.open(self._journal, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        entry = self._fleet.artifacts.entry(
            self.claim,
            self._journal,
            name=f"journal/{self.claim.unit}",
            number=self.claim.number,
            complete=False,
        )
        self._fleet.units.register_journal(self.claim, entry.to_text())

    def progress(self, counters: Counters, data: Mapping[str, Any] | None = None) -> None:
        self._pending = (dict(counters), dict(data or {}))
        self._wake.set()

    def draining(self) -> None:
        self._on_draining(self)

    def add_units(self, units: Sequence[UnitSpec]) -> None:
        self._fleet.units.add(self.claim, [(u.id, u.number, u.spec) for u in units])

    def _redacted(self, value: Any) -> Any:
        """JSON with the secrets in its texts replaced: errors quote what they were given."""
        match value:
            case str():
                return redact(value, self.secrets)
            case Mapping():
                return {name: self._redacted(item) for name, item in value.items()}
            case list() | tuple():
                return [self._redacted(item) for item in value]
        return value

    async def report_progress(self) -> None:
        """Send the latest counters, coalesced, until cancelled. Raises LeaseLost."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not await asyncio.to_thread(self.send_progress):
                self._wake.set()  # others were told of; what this unit has to say is still to come
            await asyncio.sleep(1 / PROGRESS_RATE)

    def send_progress(self) -> bool:
        """Send the latest counters, if there are any; False where no event tells of them. Raises
        LeaseLost, FleetUnavailable."""
        return self._pending is None or self._fleet.units.progress(self.claim, *self._pending)
