"""A job of ``spider demo``: submitted, shown while it runs, and followed to its end."""

from __future__ import annotations

__all__ = ["DemoFleet", "run_job"]

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spider_api.commands.reporting import Reporter
from spider_sdk.cli.follow import follow
from spider_sdk.cli.state import State
from spider_sdk.client import Client
from spider_sdk.errors import JobCancelled, JobFailed
from spider_sdk.jobs import JobStatus


@dataclasses.dataclass(frozen=True)
class DemoFleet:
    """Where a running fleet is, and ``shipped``, the folder of what the demo's jobs are made of."""

    base_url: str
    api_key: str
    shipped: Path


def run_job(
    client: Client, state: State, say: Reporter, config: Path, changes: Mapping[str, Any]
) -> str:
    """Submit the client's job, which ``config`` describes, and return its id once it is completed.
    ``changes`` name the files of the checkout from wherever the demo is run.

    Raises JobFailed and JobCancelled.
    """
    job_id = client.submit_job(changes)["job_id"]
    say.status("demo", f"submitted {config} as job {job_id}")
    document = follow(client, state, job_id)
    if document["status"] == JobStatus.CANCELLED:
        raise JobCancelled(f"job {job_id} was cancelled")
    if document["status"] != JobStatus.COMPLETED:
        raise JobFailed(f"the demo's job failed: {document['error']}")
    return job_id
