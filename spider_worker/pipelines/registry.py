"""From a job to the pipeline that runs it."""

from __future__ import annotations

__all__ = ["build_pipeline", "real_parts"]

import functools
import logging
import time
from collections.abc import Mapping
from typing import Any

from spider_sdk.config.model import Job, JobConfig, ProcessorConfig, SweConfig
from spider_sdk.errors import JobCancelled, NotSupported
from spider_sdk.jobs import Queue
from spider_worker.pipelines.base import JobContext, Pipeline
from spider_worker.pipelines.offline_gen.parts import Parts
from spider_worker.sandbox.base import Sandbox
from spider_worker.settings import WorkerSettings
from spider_worker.sinks.base import Publisher
from spider_worker.sources.base import Source

log = logging.getLogger(__name__)


def build_pipeline(job: Job, settings: WorkerSettings) -> Pipeline[Any]:
    """The pipeline of the job's queue. Raises NotSupported where the job asks it for what it cannot
    do, and FatalJobError where the job contradicts itself."""
    if isinstance(job, SweConfig):
        from spider_worker.pipelines.swe_agent.build import real_parts as agent_parts
        from spider_worker.pipelines.swe_agent.pipeline import SweAgentPipeline

        return SweAgentPipeline(job, agent_parts(settings))
    queue = job.queue
    if queue is Queue.OFFLINE_GEN:
        from spider_worker.pipelines.offline_gen.pipeline import OfflineGenPipeline

        return OfflineGenPipeline(job, real_parts(settings))
    if queue is Queue.ONPOLICY_TRAIN:
        from spider_worker.pipelines.onpolicy_train.build import real_parts as training_parts
        from spider_worker.pipelines.onpolicy_train.pipeline import OnPolicyPipeline

        return OnPolicyPipeline(job, training_parts(settings))
    raise NotSupported(f"jobs of queue {queue.value} are not run by this version")


def real_parts(settings: WorkerSettings) -> Parts:
    """Engines, sources, sandboxes and sinks as this worker may use them. Imported here, so that
    what a job does not use is not loaded for it."""
    from spider_worker.engines import registry as engines
    from spider_worker.sandbox.build import build_sandbox
    from spider_worker.sinks.hub import build_publisher
    from spider_worker.sinks.parquet import write_parquet
    from spider_worker.sources.build import build_source

    policy = engines.EnginePolicy.from_settings(settings)

    def source(ctx: JobContext) -> Source:
        config = ctx.job.source
        paths = {file.name: ctx.input_path(file.sha256) for file in config.inputs}
        seed, token = ctx.job.generation.seed, ctx.secrets.get("HF_TOKEN")
        return build_source(config, paths, seed, token, data_roots=policy.data_roots)

    def sandbox(job: JobConfig, processor: ProcessorConfig, stage: str) -> Sandbox:
        output = functools.partial(log.info, "%s prints: %s", stage)
        return build_sandbox(processor, job.runtime, settings, stage=stage, on_output=output)

    def publisher(ctx: JobContext, state: Mapping[str, Any]) -> Publisher:
        return build_publisher(
            ctx.job,
            token=ctx.secrets.get("HF_TOKEN"),
            work_dir=ctx.scratch / "publish",
            state=state,
            sleep=functools.partial(_sleep, ctx),
        )

    return Parts(
        engine=lambda job, env: engines.build_engine(job.model, job.generation, env, policy=policy),
        check_engine=lambda job, env: engines.check_engine(
            job.model, job.generation, env, policy=policy
        ),
        engine_key=lambda job, env: engines.engine_key(job.model, job.generation, env),
        engine_outlives_job=lambda job: engines.outlives_job(job.model),
        in_flight=lambda job, engine: engines.in_flight(engine, job.model, job.generation),
        source=source,
        sandbox=sandbox,
        publisher=publisher,
        write_parquet=write_parquet,
    )


def _sleep(ctx: JobContext, seconds: float) -> None:
    """Wait on a thread. Raises JobCancelled within a moment of a cancel."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if ctx.cancelled:
            raise JobCancelled
        time.sleep(min(left, 0.2))
