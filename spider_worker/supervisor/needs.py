"""What a job needs of the worker that runs it."""

from __future__ import annotations

__all__ = ["devices_needed", "runner_key"]

from collections.abc import Mapping

from spider_sdk.config.model import Job, SweConfig
from spider_worker.engines import registry


def devices_needed(job: Job) -> int:
    """Accelerators that a runner of this job needs. Raises NotSupported for sizes that are none."""
    if isinstance(job, SweConfig):
        return 0  # its model is behind an address
    return registry.devices_needed(job)


def runner_key(job: Job, job_id: str, secrets: Mapping[str, str]) -> str:
    """Equal for jobs that one runner can serve in turn. What a SWE job's runner keeps warm,
    processes that have an agent's packages loaded, is of use to any other."""
    if isinstance(job, SweConfig):
        return "agents"
    return registry.runner_key(job, job_id, secrets)
