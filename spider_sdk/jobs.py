"""The words of the wire for jobs: states, and the documents that the API answers with."""

from __future__ import annotations

__all__ = ["QUEUES", "TERMINAL", "JobStatus", "Queue", "StatusDocument", "Submission"]

import enum
from typing import Any, TypedDict


class JobStatus(enum.StrEnum):
    """The life of a job."""

    QUEUED = "queued"  #: accepted and durable; no unit of it is leased
    RUNNING = "running"  #: at least one unit was claimed and work remains
    COMPLETED = "completed"  #: every unit is committed and the job was finalised
    FAILED = "failed"  #: no attempt can help, or the attempts are spent; rows so far are kept
    CANCELLED = "cancelled"  #: its owner stopped it; rows so far are kept

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL


TERMINAL = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED})


class Queue(enum.StrEnum):
    """Where a job waits, which is also the pipeline that will run it."""

    OFFLINE_GEN = "offline-gen"
    ONPOLICY_TRAIN = "onpolicy-train"
    SWE_AGENT = "swe-agent"


QUEUES = tuple(queue.value for queue in Queue)


class Submission(TypedDict):
    """The answer to ``POST /v1/jobs``."""

    job_id: str
    status: str


class StatusDocument(TypedDict):
    """The answer to ``GET /v1/jobs/{id}``. Times are ISO 8601 in UTC.

    ``artifacts_path`` is the URL path of the job's artifacts; ``remote_artifact`` the
    Hub URL once something was pushed, else None; ``error`` None unless it failed.
    ``metrics`` holds the counters of ``spider_worker.pipelines.base``.
    """

    job_id: str
    status: str
    submitted_at: str
    updated_at: str
    messages: list[str]
    error: str | None
    artifacts_path: str | None
    remote_artifact: str | None
    metrics: dict[str, Any]
    job: dict[str, Any]
    events: list[dict[str, Any]]
    events_next_offset: int
    events_start_offset: int
    events_truncated: bool
