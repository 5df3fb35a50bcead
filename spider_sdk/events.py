"""Events: what a job says while it lives, in the order it said it."""

from __future__ import annotations

__all__ = ["Event", "Level"]

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any


class Level(enum.StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclasses.dataclass(frozen=True)
class Event:
    """One event of one job.

    ``offset`` counts from 0 without gaps; the SSE ``id:`` is ``{offset}-1`` (the
    Redis stream id, so that ``Last-Event-ID`` needs no translation). ``timestamp``
    is ISO 8601 in UTC, by the Redis server's clock. ``code`` is stable and
    dotted (``job.queued``, ``unit.claimed``, ``progress``, ``job.completed``);
    ``message`` is for people and may change. An event with code ``job.completed``,
    ``job.failed`` or ``job.cancelled`` is the last, until a retry.
    """

    offset: int
    timestamp: str
    level: str
    code: str
    message: str
    data: Mapping[str, Any]

    @property
    def stream_id(self) -> str:
        return f"{self.offset}-1"

    def to_json(self) -> dict[str, Any]:
        return {
            "offset": self.offset,
            "timestamp": self.timestamp,
            "level": self.level,
            "code": self.code,
            "message": self.message,
            "data": dict(self.data),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Event:
        return cls(
            offset=int(document["offset"]),
            timestamp=str(document["timestamp"]),
            level=str(document["level"]),
            code=str(document["code"]),
            message=str(document["message"]),
            data=dict(document.get("data") or {}),
        )
