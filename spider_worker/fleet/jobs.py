"""Job records: submit, look up, list, cancel, retry. Every change is one script."""

from __future__ import annotations

__all__ = ["JobRecord", "JobStore"]

import base64
import dataclasses
import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from spider_sdk.config import parse_job
from spider_sdk.errors import (
    ConfigError,
    IdempotencyConflict,
    IllegalTransition,
    JobNotFound,
    Problem,
)
from spider_sdk.jobs import JobStatus, Queue
from spider_worker.fleet.caps import Caps, argument
from spider_worker.fleet.connection import Client, Scripts, fleet_errors
from spider_worker.fleet.names import job_key, key, new_job_id
from spider_worker.fleet.secret_box import SecretBox
from spider_worker.settings import FleetSettings

PublishHint = Callable[[str, str], object]


@dataclasses.dataclass(frozen=True)
class JobRecord:
    """A job as it stands. Times are ISO 8601 in UTC; ``error`` and ``remote_artifact`` are
    None where there is none; ``metrics["cost_usd"]`` is None while it is not
    known whole; ``next_offset`` is the offset that its next event will have."""

    job_id: str
    owner: str
    queue: Queue
    status: JobStatus
    submitted_at: str
    updated_at: str
    error: str | None
    reason: str | None
    metrics: dict[str, float | None]
    document: dict[str, Any]
    remote_artifact: str | None
    next_offset: int
    cancel_requested: bool


class JobStore:
    """The records. ``hint`` is called with (job, queue) after a submit or a retry; what it
    cannot deliver the reaper delivers later. ``mirror`` keeps a copy of a new record beside
    the artifacts."""

    def __init__(
        self,
        client: Client,
        scripts: Scripts,
        box: Callable[[], SecretBox],
        settings: FleetSettings,
        hint: PublishHint,
        mirror: Callable[[JobRecord], None],
    ) -> None:
        self._redis = client
        self._scripts = scripts
        self._box = box
        self._settings = settings
        self._hint = hint
        self._mirror = mirror

    def submit(
        self,
        owner: str,
        document: Mapping[str, Any],
        env: Mapping[str, str],
        *,
        queue: Queue,
        idempotency_key: str | None = None,
    ) -> JobRecord:
        """Make a job durable, then hint at it.

        The same ``idempotency_key`` and document within 24 hours get the first answer again
        (``env`` is no part of the comparison: a secret must not be hashed into Redis).
        Raises IdempotencyConflict, FleetUnavailable; after either nothing was accepted.
        """
        job_id = new_job_id()
        text = _text(document)
        caps = Caps.of(document)
        word, known = self._scripts.run(
            "submit",
            job_id,
            owner,
            queue.value,
            text,
            hashlib.sha256(text.encode()).hexdigest(),
            idempotency_key or "",
            argument(caps.max_runners),
            self._settings.event_history,
            self._box().seal(job_id, env),
            int(self._settings.secret_ttl),
            argument(caps.max_live),
            argument(caps.budget),
            argument(caps.reserve),
        )
        if word == b"conflict":
            raise IdempotencyConflict(
                f"this Idempotency-Key was used for job {known.decode()} with another body"
            )
        record = self.get(known.decode(), owner)
        if record.job_id == job_id:
            self._hint(job_id, queue.value)
            self._mirror(record)
        return record

    def get(self, job_id: str, owner: str | None = None) -> JobRecord:
        """Raises JobNotFound, also where the job is another owner's (None: any owner's)."""
        with fleet_errors():
            # No MULTI: a full Redis would refuse it, and reading needs no more than it shows.
            pipe = self._redis.pipeline(transaction=False)
            pipe.hgetall(job_key(job_id))
            pipe.hgetall(job_key(job_id, "metrics"))
            raw, metrics = pipe.execute()
        fields = {name.decode(): value.decode() for name, value in raw.items()}
        if not fields or (owner is not None and fields["owner"] != owner):
            raise JobNotFound(f"there is no job {job_id}")
        return JobRecord(
            job_id=job_id,
            owner=fields["owner"],
            queue=Queue(fields["queue"]),
            status=JobStatus(fields["status"]),
            submitted_at=_iso(fields["submitted"]),
            updated_at=_iso(fields["updated"]),
            error=fields.get("error") or None,
            reason=fields.get("reason") or None,
            metrics=_metrics(metrics),
            document=json.loads(fields["document"]),
            remote_artifact=fields.get("remote") or None,
            next_offset=int(fields["offset"]),
            cancel_requested=fields["cancel"] == "1",
        )

    def list(
        self,
        owner: str,
        *,
        status: JobStatus | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> tuple[list[JobRecord], str | None]:
        """The owner's jobs, newest first, and the cursor of the next page (None: no more).

        Raises ValueError for a cursor that this method never gave.
        """
        index = key("owner", owner, "jobs")
        bound, skip = _cursor(cursor)
        found: list[JobRecord] = []
        while True:
            with fleet_errors():
                page = self._redis.zrevrangebyscore(
                    index, bound, "-inf", start=skip, num=limit, withscores=True
                )
            for member, score in page:
                # Jobs of one millisecond share a score: count how many of them were passed.
                skip = skip + 1 if str(int(score)) == bound else 1
                bound = str(int(score))
                record = self.get(member.decode(), owner)
                if status is None or record.status is status:
                    found.append(record)
                    if len(found) == limit:
                        token = base64.urlsafe_b64encode(f"{bound}/{skip}".encode())
                        return found, token.decode()
            if len(page) < limit:
                return found, None

    def cancel(self, job_id: str, owner: str | None = None) -> JobRecord:
        """Ask the job to stop; at once where nobody works on it. Ended jobs stay as they are."""
        self.get(job_id, owner)
        self._scripts.run("cancel", job_id)
        return self.get(job_id, owner)

    def retry(
        self,
        job_id: str,
        owner: str | None = None,
        env: Mapping[str, str] | None = None,
        *,
        budget: float | None = None,
    ) -> JobRecord:
        """Run what is missing and what errored, with secrets taken anew.

        ``budget`` takes the place of a SWE job's ``max_budget_total`` (None: as it is); what was
        spent counts towards it. Raises IllegalTransition where the job still runs or nothing is
        left to do, and ConfigError for a budget that the job cannot have.
        """
        record = self.get(job_id, owner)
        changed = "" if budget is None else _text(_with_budget(record.document, budget))
        answer = self._scripts.run(
            "retry",
            job_id,
            self._box().seal(job_id, env or {}),
            int(self._settings.secret_ttl),
            secrets.token_hex(8),
            changed,
            argument(budget),
        )
        if answer == b"active":
            raise IllegalTransition(
                f"job {job_id} is {record.status}; it can be retried once it has ended"
            )
        if answer == b"nothing":
            raise IllegalTransition(f"job {job_id} has no missing and no errored rows")
        self._hint(job_id, record.queue.value)
        record = self.get(job_id, owner)
        if changed:
            self._mirror(record)
        return record

    def secrets(self, job_id: str) -> dict[str, str]:
        """The job's ``env``, for the runner that is about to work on it."""
        with fleet_errors():
            sealed = self._redis.get(key("secrets", job_id))
        return self._box().open(job_id, sealed)

    def stop_requested(self, job_id: str) -> bool:
        """Is the job cancelled or ended? One round trip, for a watcher that polls."""
        with fleet_errors():
            cancel, status = self._redis.hmget(job_key(job_id), "cancel", "status")
        return cancel == b"1" or status is None or JobStatus(status.decode()).is_terminal


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def _with_budget(document: Mapping[str, Any], budget: float) -> dict[str, Any]:
    if "swe" not in document:
        said = "only a SWE job has a budget"
        raise ConfigError([Problem("max_budget_total", said)])
    changed = {**document, "swe": {**document["swe"], "max_budget_total": budget}}
    parse_job(changed)
    return changed


def _iso(milliseconds: str) -> str:
    moment = datetime.fromtimestamp(int(milliseconds) / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _metrics(raw: Mapping[bytes, bytes]) -> dict[str, float | None]:
    """The sums over units. A cost that only some units know is no total."""
    metrics: dict[str, float | None] = {k.decode(): _number(v) for k, v in raw.items()}
    if "cost_usd" not in metrics or metrics.get("completions_unpriced"):
        metrics["cost_usd"] = None
    return metrics


def _number(value: bytes) -> float:
    number = float(value)
    return int(number) if number.is_integer() else number


def _cursor(cursor: str | None) -> tuple[str, int]:
    if cursor is None:
        return "+inf", 0
    try:
        score, skip = base64.urlsafe_b64decode(cursor.encode()).decode().split("/")
        return str(int(score)), int(skip)
    except (ValueError, UnicodeError) as error:
        raise ValueError(f"{cursor!r} is not a cursor of this list") from error
