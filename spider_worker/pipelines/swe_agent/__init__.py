"""Coding agents on software tasks: an instance is a unit, and a record its result.

``planning`` finds the tasks and what can be known before any money is spent, ``attempts`` runs one
instance until it has an outcome, ``journal`` keeps what was done and spent through a kill,
``gathering`` makes the output tree of the records, ``pipeline`` is the contract.
"""

from __future__ import annotations

__all__ = ["build_pipeline"]

from spider_sdk.config.model import SweConfig
from spider_worker.pipelines.base import Pipeline
from spider_worker.settings import WorkerSettings


def build_pipeline(job: SweConfig, settings: WorkerSettings) -> Pipeline[SweConfig]:
    """The pipeline on the parts that this worker has."""
    from spider_worker.pipelines.swe_agent.build import real_parts
    from spider_worker.pipelines.swe_agent.pipeline import SweAgentPipeline

    return SweAgentPipeline(job, real_parts(settings))
