"""A few rows of a job on this machine: the real pipeline, with or without its engine."""

from __future__ import annotations

__all__ = ["Preview", "preview_job", "untrained", "why_no_generation"]

import asyncio
import dataclasses
import importlib.util
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from spider_sdk.config.model import JobConfig, ModelConfig, OutputConfig
from spider_sdk.errors import AuthError, EngineUnavailable
from spider_sdk.records import Record
from spider_worker.engines.base import (
    Completion,
    EngineInfo,
    EngineStats,
    SamplingParams,
    Usage,
)
from spider_worker.pipelines.local import LocalContext, LocalStore, run_job_locally
from spider_worker.pipelines.offline_gen.parts import Parts
from spider_worker.pipelines.offline_gen.pipeline import OfflineGenPipeline
from spider_worker.pipelines.registry import real_parts
from spider_worker.settings import WorkerSettings

log = logging.getLogger(__name__)

#: Parameters that mean the same to the local trainer and to the transformers engine.
_SHARED_PARAMETERS: Final = frozenset(
    {"attn_implementation", "device", "dtype", "max_model_len", "revision", "trust_remote_code"}
)


@dataclasses.dataclass(frozen=True)
class Preview:
    """``records`` in order; ``dropped`` the rows that a processor answered with None;
    ``skipped`` why nothing was generated, None where it was (else records have prompts only, and
    the post-processor did not run)."""

    records: list[Record]
    dropped: list[int]
    skipped: str | None


class _NoEngine:
    """Takes prompts and answers nothing."""

    info = EngineInfo("none", 16)

    def stats(self) -> EngineStats:
        return EngineStats(0, 16)

    async def start(self) -> None:
        pass

    async def complete(
        self,
        messages: Sequence[Mapping[str, Any]],  # noqa: ARG002 - the contract's
        tools: Sequence[Mapping[str, Any]],  # noqa: ARG002
        params: SamplingParams,  # noqa: ARG002
    ) -> Completion:
        return Completion("", None, Usage(None, None))

    async def close(self) -> None:
        pass


def preview_job(
    job: JobConfig,
    rows: int,
    *,
    inputs: Mapping[str, Path],
    secrets: Mapping[str, str],
    settings: WorkerSettings,
    skip: str | None = None,
) -> Preview:
    """The first ``rows`` rows, one sample each; nothing is published. ``inputs`` are local files
    by hash; ``skip`` is a reason not to generate. Raises FatalJobError for what would fail the
    job before its first row."""
    if job.generation.on_policy:
        job, reason = untrained(job)
        skip = skip or reason
    most = job.source.max_examples
    job = dataclasses.replace(
        job,
        source=dataclasses.replace(
            job.source, max_examples=rows if most is None else min(rows, most)
        ),
        generation=dataclasses.replace(job.generation, duplications=1),
        output=OutputConfig(),
    )
    parts = real_parts(settings)
    skipped = skip or why_no_generation(job, parts, secrets)
    if skipped is None:
        try:
            return _run(job, parts, inputs, secrets, None)
        except EngineUnavailable as error:
            skipped = error.message
    prompts = dataclasses.replace(
        parts,
        engine=lambda job, secrets: _NoEngine(),  # noqa: ARG005
        check_engine=lambda job, secrets: None,  # noqa: ARG005
        in_flight=lambda job, engine: engine.info.capacity,  # noqa: ARG005
    )
    return _run(dataclasses.replace(job, post_processor=None), prompts, inputs, secrets, skipped)


def untrained(job: JobConfig) -> tuple[JobConfig, str | None]:
    """A training job as one that has its student, as it is before the first step, answer the
    prompts; and why that cannot be generated here, None where it can be tried."""
    options, model = job.generation.on_policy_options, job.model
    parameters: Mapping[str, Any] = model.parameters
    reason = None
    if model.provider == "tinker":
        reason = f"the student {model.name} is with the Tinker service"
    elif options is not None and (options.student_checkpoint_path or model.student_checkpoint_path):
        reason = "the student starts from a checkpoint, which is loaded for training alone"
    if model.provider == "vllm":
        provider, parameters = "vllm", parameters.get("vllm") or {}
    else:
        provider = "transformers"
        parameters = {k: v for k, v in parameters.items() if k in _SHARED_PARAMETERS}
    sampling = dict(job.generation.parameters)
    if options is not None:
        sampling.setdefault("max_tokens", options.max_tokens)
    generation = dataclasses.replace(
        job.generation, on_policy=False, on_policy_options=None, parameters=sampling
    )
    student = ModelConfig(provider, model.name, parameters)
    changed = dataclasses.replace(job, model=student, generation=generation, evaluator=None)
    return changed, reason


def why_no_generation(job: JobConfig, parts: Parts, secrets: Mapping[str, str]) -> str | None:
    """Why this machine cannot generate, or should not be made to; None where it can.

    Raises NotSupported and other FatalJobErrors that say the job is wrong wherever it runs.
    """
    if job.model.provider == "vllm" and importlib.util.find_spec("vllm") is None:
        return "provider vllm: the package vllm is not installed here"
    try:
        parts.check_engine(job, secrets)
    except (AuthError, EngineUnavailable) as error:
        return error.message
    if job.model.provider != "openai" and not _is_here(job.model, secrets):
        return f"the model {job.model.name} is not on this machine, and preview downloads none"
    return None


def _is_here(model: ModelConfig, secrets: Mapping[str, str]) -> bool:  # noqa: ARG001
    from huggingface_hub import try_to_load_from_cache

    if not _looks_like_hub_id(model.name):
        return True  # a path; whether it is there and allowed was checked with the engine
    return isinstance(try_to_load_from_cache(model.name, "config.json"), str)


def _looks_like_hub_id(name: str) -> bool:
    return not Path(name).exists() and not name.startswith((".", "/", "~"))


def _run(
    job: JobConfig,
    parts: Parts,
    inputs: Mapping[str, Path],
    secrets: Mapping[str, str],
    skipped: str | None,
) -> Preview:
    with tempfile.TemporaryDirectory(prefix="spider-preview-") as folder:
        store = LocalStore(Path(folder))
        pipeline = OfflineGenPipeline(job, parts)

        async def main() -> Preview:
            ctx = LocalContext(store, job, inputs=inputs, secrets=secrets)
            done = await run_job_locally(pipeline, ctx)
            records = done.records()
            rows = int(done.counters().get("rows_done", 0))
            dropped = sorted(set(range(rows)) - {record["index"] for record in records})
            return Preview(records, dropped, skipped)

        return asyncio.run(main())
