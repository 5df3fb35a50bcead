"""Spider's client: load a config, submit it as a job, follow it, fetch what it made.

::

    from spider_sdk import AppConfig, Client

    config = AppConfig.load("job.yaml")
    with Client(config=config) as client:
        job_id = client.submit_job()["job_id"]
        status = client.poll_job(job_id)
        if status["status"] == "completed":
            client.download_result(job_id, destination="result.json")

The names below are the public ones; they are imported when they are first used, so that the
worker, which shares this package, does not load an HTTP client for its words.
"""

from __future__ import annotations

__all__ = [
    "ApiError",
    "AppConfig",
    "Client",
    "ConfigError",
    "Conflict",
    "Event",
    "JobCancelled",
    "JobFailed",
    "JobStatus",
    "NotFound",
    "PollTimeout",
    "Problem",
    "ServerBusy",
    "ServerUnreachable",
    "SpiderClient",
    "SpiderError",
    "StatusDocument",
    "Submission",
    "Unauthorized",
    "UsageError",
]

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spider_sdk.client import Client, SpiderClient
    from spider_sdk.config import AppConfig
    from spider_sdk.errors import (
        ApiError,
        ConfigError,
        Conflict,
        JobCancelled,
        JobFailed,
        NotFound,
        PollTimeout,
        Problem,
        ServerBusy,
        ServerUnreachable,
        SpiderError,
        Unauthorized,
        UsageError,
    )
    from spider_sdk.events import Event
    from spider_sdk.jobs import JobStatus, StatusDocument, Submission

_HOMES = {
    "AppConfig": "spider_sdk.config",
    "Client": "spider_sdk.client",
    "SpiderClient": "spider_sdk.client",
    "Event": "spider_sdk.events",
    "JobStatus": "spider_sdk.jobs",
    "StatusDocument": "spider_sdk.jobs",
    "Submission": "spider_sdk.jobs",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "spider_sdk.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
