"""Rules over several keys, and what can be submitted."""

from __future__ import annotations

from typing import Any

import pytest

from spider_sdk.config import AppConfig, check_submittable, parse_job
from spider_sdk.errors import ConfigError
from tests.unit.config.documents import job

ON = {"on_policy": True, "on_policy_options": {"teacher": "a/b"}}
EVALUATOR = {"name": "score", "source": "def score(row): return 1"}
INPUTS = [{"name": "rows.jsonl", "sha256": "0" * 64}]
HUB = {"mode": "upload_hf", "hf": {"repo_id": "me/rows"}}


def on(**options: Any) -> dict[str, Any]:
    return {"on_policy": True, "on_policy_options": {"teacher": "a/b", **options}}


def hub(**changes: Any) -> dict[str, Any]:
    return {"mode": "upload_hf", "hf": {"repo_id": "me/rows", **changes}}


@pytest.mark.parametrize(
    ("document", "path", "remedy"),
    [
        (job(output={"mode": "upload_hf"}), "output.hf", "add hf:"),
        (job(output={"hf": {"repo_id": "me/x"}}), "output.hf", "set mode: upload_hf"),
        (job(output=hub(repo_id="rows")), "output.hf.repo_id", "owner/name"),
        (job(output=hub(repo_id="a/b/c")), "output.hf.repo_id", "owner/name"),
        (job(output=hub(repo_id="a/b--c")), "output.hf.repo_id", "owner/name"),
        (job(output=hub(repo_type="model")), "output.hf.repo_type", "repo_type: dataset"),
        (
            job(generation=ON, output=hub(repo_type="dataset")),
            "output.hf.repo_type",
            "repo_type: model",
        ),
        (job(generation={"on_policy": True}), "generation.on_policy_options", "teacher"),
        (
            job(generation={"on_policy": True, "on_policy_options": {}}),
            "generation.on_policy_options.teacher",
            "required",
        ),
        (
            job(generation={"on_policy_options": {"teacher": "a/b"}}),
            "generation.on_policy_options",
            "on_policy: true",
        ),
        (
            job(generation={"seed": 1, "parameters": {"seed": 2}}),
            "generation.parameters.seed",
            "keep one",
        ),
        (job(generation={**ON, "duplications": 2}), "generation.duplications", "group_size"),
        (job(generation={"upload_every": 5}), "generation.upload_every", "mode: upload_hf"),
        (
            job(source={"streaming": True, "split": "train[:10%]"}),
            "source.split",
            "streaming: false",
        ),
        (
            job(model={"student_checkpoint_path": "tinker://x"}),
            "model.student_checkpoint_path",
            "model.name",
        ),
        (
            job(
                model={"student_checkpoint_path": "one"},
                generation={
                    "on_policy": True,
                    "on_policy_options": {"teacher": "a", "student_checkpoint_path": "two"},
                },
            ),
            "generation.on_policy_options.student_checkpoint_path",
            "keep one",
        ),
        (job(evaluator=EVALUATOR), "evaluator", "post_processor"),
        (job(generation=ON, post_processor=EVALUATOR), "post_processor", "evaluator"),
        (job(generation=ON, tools=[EVALUATOR]), "tools", "one turn"),
        (job(generation=ON, parallelism=2), "parallelism", "one unit"),
        (job(generation=ON, shard_size=10), "shard_size", "one unit"),
        (job(generation={**ON, "max_batch_size": 8}), "generation.max_batch_size", "group_size"),
        (
            job(generation={**ON, "upload_every": 8}, output=HUB),
            "generation.upload_every",
            "save_every",
        ),
        (job(generation=ON, output={"format": "parquet"}), "output.format", "adapter"),
        (job(generation=ON, output=hub(config_name="a")), "output.hf.config_name", "model"),
        (
            job(generation=ON, model={"pricing": {"input_per_million": 1}}),
            "model.pricing",
            "tokens",
        ),
        (
            job(generation={**on(seed=1), "seed": 2}),
            "generation.on_policy_options.seed",
            "generation.seed",
        ),
        (
            job(generation=on(wandb_name="a")),
            "generation.on_policy_options.wandb_name",
            "wandb_project",
        ),
        (
            job(generation=on(tracker="trackio")),
            "generation.on_policy_options.tracker",
            "wandb_project",
        ),
        (
            job(generation=on(groups_per_batch=2, group_size=2, num_substeps=5)),
            "generation.on_policy_options.num_substeps",
            "4 samples",
        ),
        (job(model={"base_url": "http://h/v1"}), "model.base_url", "provider openai"),
        (job(model={"provider": "openai", "base_url": "h:80"}), "model.base_url", "http://"),
        (job(model={"provider": "openai", "api_key_env": "PATH"}), "model.api_key_env", "PATH"),
        (job(runtime={"env": {"LD_PRELOAD": "x"}}), "runtime.env.LD_PRELOAD", "another name"),
        (job(runtime={"packages": ["--index-url=x"]}), "runtime.packages.0", "requirement"),
        (
            job(source={"inputs": [{"name": "../x", "sha256": "0" * 64}]}),
            "source.inputs.0.name",
            "folders",
        ),
        (job(pre_processor={"name": "f.g", "source": "x"}), "pre_processor.name", "function"),
        (job(output=hub(config_name="a b")), "output.hf.config_name", "letters"),
        (job(output=hub(config_name="..")), "output.hf.config_name", "letter or digit first"),
        ({"swe": {"llm_model": "x"}, "model": {}}, "model", "nothing beside"),
    ],
)  # fmt: skip
def test_rule(document: dict[str, Any], path: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_job(document)
    (problem,) = caught.value.problems
    assert problem.path == f"job.{path}"
    assert remedy in problem.message


def test_what_the_rules_allow() -> None:
    assert parse_job(job(output=HUB)).output.hf is not None
    assert parse_job(job(source={"streaming": True, "split": "train[0:10]"})).source.streaming
    assert parse_job(job(source={"split": "train[:10%]"})).source.split == "train[:10%]"
    assert parse_job(job(generation={**ON, "duplications": 1})).generation.on_policy
    assert parse_job(job(generation={**on(seed=3), "seed": 3}, parallelism=1)).evaluator is None
    assert parse_job(job(generation=ON, evaluator=EVALUATOR)).evaluator is not None
    assert parse_job(job(source={"max_examples": 1e3})).source.max_examples == 1000


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"instance_filter": "a("}, "instance_filter"),
        ({"push_filter": "resolved", "hf_repo_id": "a/b"}, "push_filter"),
        ({"hf_private": True}, "hf_private"),
        ({"agent_class": "BrowsingAgent"}, "agent_class"),
        ({"workspace": "bwarp"}, "workspace"),
        ({"llm_api_key_env": "sk-123"}, "llm_api_key_env"),
    ],
)
def test_swe_rule(values: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AppConfig.from_dict({"llm_model": "gpt-4o", **values})
    assert [problem.path for problem in caught.value.problems] == [path]


@pytest.mark.parametrize(
    ("document", "path"),
    [
        (job(source={"field": None}), "job.source.field"),
        (job(tools=[{"name": "f", "source": "x"}]), "job.tools"),
        (job(model={"provider": "tinker"}), "job.model.provider"),
        (job(model={"provider": "local"}), "job.model.provider"),
        (job(generation=ON, model={"provider": "openai"}), "job.model.provider"),
        (
            job(generation=on(teacher=["a/b", {"name": "a/b", "when": {"kind": 1}}])),
            "job.generation.on_policy_options.teacher.1.name",
        ),
        (
            job(generation=on(teacher={"name": "a/b", "provider": "local", "api_key_env": "K"})),
            "job.generation.on_policy_options.teacher.0.api_key_env",
        ),
        (job(generation=on(api_key_env="K")), "job.generation.on_policy_options.api_key_env"),
        (job(runtime={"packages": ["numpy"]}), "job.runtime.packages"),
        (job(runtime={"env": {"TZ": "UTC"}}), "job.runtime.env"),
        (job(source={"inputs": INPUTS, "revision": "main"}), "job.source.revision"),
        (job(source={"inputs": INPUTS, "config_name": "x"}), "job.source.config_name"),
    ],
)
def test_loads_and_is_refused_at_submit(document: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_submittable(parse_job(document))
    assert [problem.path for problem in caught.value.problems] == [path]


def test_submittable() -> None:
    check_submittable(parse_job(job()))
    processor = {"name": "f", "source": "def f(row): ..."}
    check_submittable(parse_job(job(source={"field": None}, pre_processor=processor)))
    runtime = {"packages": ["numpy"], "env": {"TZ": "UTC"}}
    check_submittable(parse_job(job(runtime=runtime, post_processor=processor)))
    check_submittable(parse_job(job(runtime=runtime, evaluator=EVALUATOR, generation=ON)))
    served = {"name": "a/b", "base_url": "http://h:1/v1", "api_key_env": "K"}
    for teacher in (served, {**served, "provider": "openai"}):
        check_submittable(parse_job(job(generation=on(teacher=teacher))))
