"""Units: claimed, kept alive, committed or given up, always under a fence."""

from __future__ import annotations

__all__ = ["Beat", "Claim", "NoUnit", "UnitStore"]

import dataclasses
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from spider_sdk.errors import LeaseLost
from spider_worker.fleet.connection import Client, Scripts, fleet_errors
from spider_worker.fleet.names import job_key
from spider_worker.settings import FleetSettings

#: Ceiling of the doubling pause between attempts, in seconds.
BACKOFF_CAP = 60.0


@dataclasses.dataclass(frozen=True)
class Claim:
    """A held unit. ``fence`` and ``attempt`` together are the right to write; ``attempts`` is
    how many were begun in a row without progress, this one included."""

    job_id: str
    unit: str
    kind: str
    number: int
    spec: Mapping[str, Any]
    fence: int
    attempt: str
    attempts: int
    life: int = 0
    """How often the job had been retried when this was claimed."""
    grant: float | None = None
    """US dollars that this attempt may spend; None where the job has no budget."""

    @property
    def stem(self) -> str:
        """The part of a file name that no other attempt shares."""
        return f"{self.unit}.{self.fence}.{self.attempt[:8]}"

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "spec": dict(self.spec)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Claim:
        return cls(**document)


@dataclasses.dataclass(frozen=True)
class NoUnit:
    """Nothing to claim. ``retry_in`` is the seconds until a delayed unit is due, or None."""

    retry_in: float | None


@dataclasses.dataclass(frozen=True)
class Beat:
    """What a heartbeat learnt: the job is to stop; the claims that are lost."""

    cancelled: bool
    lost: Sequence[Claim]


class UnitStore:
    def __init__(self, client: Client, scripts: Scripts, settings: FleetSettings) -> None:
        self._redis = client
        self._scripts = scripts
        self._settings = settings

    def claim(
        self, job_id: str, holder: str, kinds: Sequence[str], *, life: int | None = None
    ) -> Claim | NoUnit:
        """The first claimable unit of ``kinds``, in that order, for the runner ``holder``.

        ``life`` is that of the holder's claims so far: it gets no unit of a job that was
        retried since, whose secrets may be others. A work unit is refused while the job's caps
        (``Caps``) leave no room for another.
        """
        attempt = uuid.uuid4().hex
        answer = self._scripts.run(
            "claim",
            job_id,
            holder,
            attempt,
            int(self._settings.lease * 1000),
            ",".join(kinds),
            "" if life is None else life,
        )
        if answer[0] == b"none":
            return NoUnit(None if answer[1] < 0 else answer[1] / 1000)
        _, unit, kind, number, spec, fence, attempts, its_life, grant = answer
        return Claim(
            job_id=job_id,
            unit=unit.decode(),
            kind=kind.decode(),
            number=int(number),
            spec=json.loads(spec),
            fence=int(fence),
            attempt=attempt,
            attempts=int(attempts),
            life=int(its_life),
            grant=float(grant) if grant else None,
        )

    def later(self, job_id: str, seconds: float) -> None:
        """Ask for a hint in ``seconds``: this worker has no room for the job now."""
        self._scripts.run("later", job_id, int(seconds * 1000))

    def beat(self, job_id: str, claims: Sequence[Claim]) -> Beat:
        """Renew the leases of ``claims``, all of one job."""
        args: list[str | int] = []
        for claim in claims:
            args += [claim.unit, claim.fence, claim.attempt]
        answer = self._scripts.run("beat", job_id, int(self._settings.lease * 1000), *args)
        lost = [claim for claim, held in zip(claims, answer[1:], strict=True) if not held]
        return Beat(bool(answer[0]), lost)

    def progress(
        self, claim: Claim, counters: Mapping[str, float], data: Mapping[str, Any]
    ) -> bool:
        """Cumulative counters of this unit. False: no event told of them, there are too many.
        Raises LeaseLost."""
        return self._fenced("progress", claim, json.dumps(counters), json.dumps(data)) == 1

    def commit(
        self,
        claim: Claim,
        *,
        complete: bool,
        counters: Mapping[str, float],
        publishable: int = 0,
        outcome: Mapping[str, Any] | None = None,
        manifest: Mapping[str, str] | None = None,
    ) -> None:
        """End a unit. ``manifest`` maps names to entries; ``outcome`` is the kind's own part.

        Raises LeaseLost: the files of a stale writer stay unreferenced.
        """
        pairs = [text for item in (manifest or {}).items() for text in item]
        self._fenced(
            "commit",
            claim,
            "done" if complete else "partial",
            json.dumps(counters),
            publishable,
            json.dumps(outcome or {}),
            *pairs,
        )

    def fail(self, claim: Claim, why: str, *, fatal: bool = False, reason: str = "error") -> None:
        """End an attempt: the unit is tried again, or with ``fatal`` the job fails."""
        self._end(claim, "fatal" if fatal else "retry", why, reason)

    def release(self, claim: Claim, why: str) -> None:
        """Give a unit back through no fault of its own."""
        self._end(claim, "release", why, "released")

    def register_journal(self, claim: Claim, entry: str) -> None:
        self._fenced("journal", claim, entry)

    def save_state(self, claim: Claim, name: str, value: Mapping[str, Any]) -> None:
        self._fenced("state", claim, name, json.dumps(value))

    def keep(
        self,
        claim: Claim,
        name: str,
        value: Mapping[str, Any],
        *,
        manifest: Mapping[str, str],
        drop: Sequence[str] = (),
    ) -> None:
        """``save_state``, entries for the manifest and names that leave it, all in one step.
        Raises LeaseLost: the files of a stale writer stay unreferenced."""
        pairs = [text for item in manifest.items() for text in item]
        self._fenced("keep", claim, name, json.dumps(value), len(drop), *drop, *pairs)

    def load_state(self, job_id: str, name: str) -> dict[str, Any]:
        with fleet_errors():
            text = self._redis.hget(job_key(job_id, "state"), name)
        state: dict[str, Any] = json.loads(text) if text else {}
        return state

    def add(self, claim: Claim, units: Sequence[tuple[str, int, Mapping[str, Any]]]) -> None:
        """Append work units ``(id, number, spec)``; ids that exist are left as they are."""
        args: list[str | int] = []
        for unit, number, spec in units:
            args += [unit, number, json.dumps(spec)]
        self._fenced("add_units", claim, *args)

    def event(
        self, claim: Claim, level: str, code: str, message: str, data: Mapping[str, Any]
    ) -> None:
        text = json.dumps(data, separators=(",", ":"))
        self._fenced("event", claim, level, code, message, text)

    def counters(self, job_id: str, unit: str) -> dict[str, float]:
        with fleet_errors():
            text = self._redis.hget(job_key(job_id, "unit", unit), "counters")
        values: dict[str, float] = json.loads(text) if text else {}
        return values

    def _end(self, claim: Claim, mode: str, why: str, reason: str) -> None:
        settings = self._settings
        self._fenced(
            "fail",
            claim,
            mode,
            why,
            reason,
            settings.max_attempts,
            int(settings.backoff * 1000),
            int(BACKOFF_CAP * 1000),
        )

    def _fenced(self, script: str, claim: Claim, *args: str | float) -> int:
        held = self._scripts.run(
            script, claim.job_id, claim.unit, claim.fence, claim.attempt, *args
        )
        if not held:
            raise LeaseLost(
                f"{claim.unit} of job {claim.job_id} is no longer held with fence {claim.fence}"
            )
        return int(held)
