"""A job as the API answers with it."""

from __future__ import annotations

__all__ = ["EVENTS_A_PAGE", "brief_document", "status_document"]

from collections.abc import Sequence
from typing import Final

from spider_sdk.events import Event
from spider_sdk.jobs import StatusDocument
from spider_worker.fleet import Fleet, JobRecord

EVENTS_A_PAGE: Final = 1000
"""Events in one status document; the rest is asked for with ``?since=``."""


def status_document(fleet: Fleet, record: JobRecord, since: int = 0) -> StatusDocument:
    """The job with its events from offset ``since`` on.

    The record must have been read before this is called: its status is then never ahead of
    the events, and who stops asking at an end state has seen the last of them.
    """
    page = fleet.events.read(record.job_id, since, EVENTS_A_PAGE)
    return _document(
        record,
        page.events,
        next_offset=page.next_offset,
        start_offset=page.start_offset,
        truncated=page.truncated,
    )


def brief_document(record: JobRecord, *, next_offset: int, start_offset: int = 0) -> StatusDocument:
    """The job without events; ``next_offset`` is where to go on reading them."""
    return _document(
        record, (), next_offset=next_offset, start_offset=start_offset, truncated=False
    )


def _document(
    record: JobRecord,
    events: Sequence[Event],
    *,
    next_offset: int,
    start_offset: int,
    truncated: bool,
) -> StatusDocument:
    return StatusDocument(
        job_id=record.job_id,
        status=record.status.value,
        submitted_at=record.submitted_at,
        updated_at=record.updated_at,
        messages=[event.message for event in events if event.message],
        error=record.error,
        artifacts_path=f"/v1/jobs/{record.job_id}/artifacts",
        remote_artifact=record.remote_artifact,
        # Always there, so that "unknown" can be told from "no price was given to us yet".
        metrics={"cost_usd": None, **record.metrics},
        job=record.document,
        events=[event.to_json() for event in events],
        events_next_offset=next_offset,
        events_start_offset=start_offset,
        events_truncated=truncated,
    )
