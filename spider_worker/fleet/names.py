"""The names of the fleet's keys in Redis, all under one prefix, and the shape of ids."""

from __future__ import annotations

__all__ = ["PREFIX", "SCHEMA_VERSION", "job_key", "key", "live_channel", "new_job_id"]

import secrets
from typing import Final

PREFIX: Final = "spider:"
SCHEMA_VERSION: Final = 1


def key(*parts: str) -> str:
    return PREFIX + ":".join(parts)


def job_key(job_id: str, *parts: str) -> str:
    return key("job", job_id, *parts)


def live_channel(job_id: str) -> str:
    """The pub/sub channel on which a job's events are published as they are written."""
    return key("live", job_id)


def new_job_id() -> str:
    """64 random bits: ids are part of URLs and of file names, and never guessable in bulk."""
    return secrets.token_hex(8)
