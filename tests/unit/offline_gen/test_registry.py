"""Which pipeline runs a job."""

from __future__ import annotations

import dataclasses

import pytest

from spider_sdk.config.model import (
    GenerationConfig,
    JobConfig,
    ModelConfig,
    OnPolicyOptions,
    SourceConfig,
    TeacherConfig,
)
from spider_sdk.errors import FatalJobError
from spider_worker.pipelines.offline_gen.pipeline import OfflineGenPipeline
from spider_worker.pipelines.onpolicy_train.pipeline import OnPolicyPipeline
from spider_worker.pipelines.registry import build_pipeline
from spider_worker.settings import WorkerSettings

JOB = JobConfig(ModelConfig("vllm", "m"), SourceConfig("d", field="q"))


def test_off_policy_jobs_have_their_pipeline() -> None:
    assert isinstance(build_pipeline(JOB, WorkerSettings()), OfflineGenPipeline)


def test_on_policy_jobs_have_theirs() -> None:
    options = OnPolicyOptions((TeacherConfig("t"),))
    generation = GenerationConfig(on_policy=True, on_policy_options=options)
    job = dataclasses.replace(JOB, generation=generation)
    assert isinstance(build_pipeline(job, WorkerSettings()), OnPolicyPipeline)


def test_a_job_that_names_no_prompt_is_refused() -> None:
    job = dataclasses.replace(JOB, source=SourceConfig("d"))
    with pytest.raises(FatalJobError, match=r"source\.field is not set"):
        build_pipeline(job, WorkerSettings())
