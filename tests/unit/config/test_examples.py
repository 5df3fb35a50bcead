"""Every YAML that ships loads, and so does every one of the documented formats."""

from __future__ import annotations

from pathlib import Path

import pytest

from spider_sdk.config import (
    AppConfig,
    check_submittable,
    lift_secrets,
    parse_job,
    required_secrets,
)
from spider_sdk.jobs import Queue

ROOT = Path(__file__).parents[3]
SEED = Path(__file__).parent / "seed"
SHIPPED = sorted(path for path in (ROOT / "config").rglob("*.yaml"))


def test_there_are_examples() -> None:
    names = {str(path.relative_to(ROOT / "config")) for path in SHIPPED}
    assert {
        "test-remote-processor.yaml",
        "off-policy.yaml",
        "on-policy.yaml",
        "openai.yaml",
        "transformers.yaml",
        "swe/example-openai-config.yaml",
        "swe/example-vllm-config.yaml",
        "demo/demo.yaml",
    } <= names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_example_loads(path: Path) -> None:
    config = AppConfig.load(path, environ={})
    assert (config.job is None) != (config.swe is None)
    assert config.path == str(path)


def test_seed_off_policy() -> None:
    config = AppConfig.load(SEED / "off-policy.yaml")
    assert config.server.base_url is None
    assert config.server.api_key is None
    assert config.server.request_timeout == 120
    job = config.job
    assert job is not None
    assert job.queue is Queue.OFFLINE_GEN
    assert job.model.parameters == {"tensor_parallel_size": 4}
    assert job.source.split == "train[0:10]"
    assert job.output.hf is not None
    assert job.output.hf.private is False
    check_submittable(job)


def test_seed_on_policy() -> None:
    job = AppConfig.load(SEED / "on-policy.yaml").job
    assert job is not None
    options = job.generation.on_policy_options
    assert options is not None
    assert options.learning_rate == 5e-5
    assert [teacher.name for teacher in options.teacher] == ["Qwen/Qwen3-30B-A3B"]
    assert options.api_key is None
    assert options.loss_fn == "importance_sampling"
    assert options.compute_post_kl is True
    check_submittable(job)


def test_seed_swe() -> None:
    config = AppConfig.load(SEED / "swe-openai.yaml")
    swe = config.swe
    assert swe is not None
    assert (swe.max_instances, swe.hf_private, swe.timeout_seconds) == (50, True, 1800)
    assert config.document["swe"]["llm_model"] == "gpt-4o"
    check_submittable(swe)
    other = AppConfig.load(SEED / "swe-vllm.yaml").swe
    assert other is not None
    assert other.llm_base_url == "http://localhost:8000/v1"


#: What a file leaves to the command line: a job without source.field needs a pre-processor.
PROCESSOR = {"name": "ask", "source": "def ask(row): return row['question']"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_example_is_submittable_or_refused_by_name(path: Path) -> None:
    config = AppConfig.load(path, environ={})
    if config.swe is not None:
        check_submittable(config.swe)
        return
    assert config.job is not None
    document = dict(config.document)
    if config.job.source.field is None:
        document["pre_processor"] = PROCESSOR
    clean, env, names = lift_secrets(document, dict.fromkeys(required_secrets(config.job), "x"))
    check_submittable(parse_job(clean))
    assert set(required_secrets(config.job)) == set(env) == set(names)
