"""The event log of a job: a Redis stream whose ids are the events' offsets."""

from __future__ import annotations

__all__ = ["EventLog", "EventPage"]

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from spider_sdk.events import Event
from spider_worker.fleet.connection import Client, Scripts, fleet_errors
from spider_worker.fleet.names import job_key


@dataclasses.dataclass(frozen=True)
class EventPage:
    """Events from an offset on. ``start_offset`` is the oldest still kept; ``truncated`` says
    that the page begins later than was asked for, because older ones were trimmed."""

    events: list[Event]
    start_offset: int
    next_offset: int
    truncated: bool


class EventLog:
    def __init__(self, client: Client, scripts: Scripts) -> None:
        self._redis = client
        self._scripts = scripts

    def read(self, job_id: str, since: int = 0, limit: int = 1000) -> EventPage:
        """Events with ``offset >= since``, oldest first, at most ``limit``."""
        stream = job_key(job_id, "events")
        with fleet_errors():
            pipe = self._redis.pipeline(transaction=False)
            pipe.xrange(stream, min=f"{since}-0", max="+", count=limit)
            pipe.xrange(stream, count=1)
            pipe.hget(job_key(job_id), "offset")
            entries, oldest, offset = pipe.execute()
        events = [Event.from_json(json.loads(fields[b"event"])) for _, fields in entries]
        end = int(offset or 0)
        start = int(oldest[0][0].split(b"-")[0]) if oldest else end
        following = events[-1].offset + 1 if events else max(since, min(since, end))
        return EventPage(events, start, following, truncated=since < start)

    def append(
        self,
        job_id: str,
        level: str,
        code: str,
        message: str,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Append an event that belongs to no unit (a unit's own go through its claim)."""
        text = json.dumps(data or {}, separators=(",", ":"))
        self._scripts.run("event", job_id, "", "", "", level, code, message, text)
