"""What a job needs of the worker that runs it."""

from __future__ import annotations

from spider_sdk.config.model import JobConfig, ModelConfig, SourceConfig, SweConfig
from spider_worker.engines import registry
from spider_worker.supervisor.needs import devices_needed, runner_key


def test_a_swe_job_needs_no_accelerator_and_any_warm_runner_of_its_owner() -> None:
    assert devices_needed(SweConfig("m")) == 0
    one, other = SweConfig("m", num_workers=2), SweConfig("n", workspace="bwrap")
    assert runner_key(one, "a", {}) == runner_key(other, "b", {"KEY": "k"})


def test_other_jobs_are_judged_by_their_engines() -> None:
    model = ModelConfig("transformers", "m", parameters={"device": "cuda:1"})
    job = JobConfig(model, SourceConfig("d"))
    assert devices_needed(job) == registry.devices_needed(job) == 2
    assert runner_key(job, "a", {}) == registry.runner_key(job, "a", {})
