"""Rules over several keys of a document, each with what to do about it.

They read the plain document and not the dataclasses, so that they speak up beside
other errors; a value of a wrong type is the schema's to report and is passed over here.
"""

from __future__ import annotations

__all__ = ["Complaint", "check_submittable", "job_rules", "swe_rules"]

import re
from collections.abc import Iterator
from typing import Any, Final

from spider_sdk.config.model import Job, JobConfig, OnPolicyOptions, SweConfig
from spider_sdk.config.positions import Path
from spider_sdk.errors import ConfigError, Problem

Complaint = tuple[Path, str]

_GENERATING: Final = ("vllm", "openai", "transformers")
"""Providers that an off-policy job can generate with."""
_TRAINING: Final = ("tinker", "local", "transformers", "vllm")
"""Providers that can train a student."""
_RUN_HERE: Final = ("local", "transformers", "vllm")
"""Providers that run a model in the worker."""


def job_rules(job: Any) -> Iterator[Complaint]:
    """What is wrong with a job beyond single values; paths are relative to the job."""
    yield from _output_rules(job)
    yield from _policy_rules(job)
    one, other = _get(job, "generation", "seed"), _get(job, "generation", "parameters", "seed")
    if one is not None and other is not None and one != other:
        yield (
            ("generation", "parameters", "seed"),
            "differs from generation.seed, which gives each request a seed of its own; keep "
            "one of the two",
        )
    split = _get(job, "source", "split")
    if _get(job, "source", "streaming") is True and isinstance(split, str) and "%" in split:
        yield (
            ("source", "split"),
            f"a streamed data set has no known length, so {split!r} cannot be cut by percent; "
            f"give row numbers (train[0:1000]) or set streaming: false",
        )


def _output_rules(job: Any) -> Iterator[Complaint]:
    mode = _get(job, "output", "mode") or "return"
    hub = _get(job, "output", "hf")
    if mode == "upload_hf" and hub is None:
        yield (
            ("output", "hf"),
            "output.mode upload_hf needs output.hf; add hf: {repo_id: owner/name} or set "
            "mode: return",
        )
    if mode == "return" and hub is not None:
        yield (
            ("output", "hf"),
            "output.hf is only used with output.mode upload_hf; set mode: upload_hf or remove hf",
        )
    every = _get(job, "generation", "upload_every")
    if mode == "return" and every not in (None, 0):
        yield (
            ("generation", "upload_every"),
            "upload_every is only used with output.mode upload_hf; set mode: upload_hf or "
            "remove upload_every",
        )


def _policy_rules(job: Any) -> Iterator[Complaint]:
    on_policy = _get(job, "generation", "on_policy")
    options = _get(job, "generation", "on_policy_options")
    repo_type = _get(job, "output", "hf", "repo_type")
    if on_policy is True:
        if options is None:
            yield (
                ("generation", "on_policy_options"),
                "on_policy: true needs on_policy_options; add on_policy_options: "
                "{teacher: owner/model}",
            )
        if repo_type == "dataset":
            yield (
                ("output", "hf", "repo_type"),
                "an on-policy job publishes an adapter; set repo_type: model",
            )
        if _get(job, "generation", "duplications") not in (None, 1):
            yield (
                ("generation", "duplications"),
                "an on-policy job samples each prompt on_policy_options.group_size times; "
                "set that instead",
            )
        yield from _checkpoints(job, options)
        yield from _idle_in_training(job)
        yield from _training_rules(job, options)
    elif on_policy in (None, False):
        if _get(job, "evaluator") is not None:
            yield (
                ("evaluator",),
                "an evaluator scores the student of an on-policy job; what an off-policy job "
                "generates is seen by a post_processor",
            )
        if options is not None:
            yield (
                ("generation", "on_policy_options"),
                "on_policy_options is only used with on_policy: true; set that or remove it",
            )
        if repo_type == "model":
            yield (
                ("output", "hf", "repo_type"),
                "an off-policy job publishes rows; set repo_type: dataset (or on_policy: true)",
            )
        if _get(job, "model", "student_checkpoint_path") is not None:
            yield (
                ("model", "student_checkpoint_path"),
                "an off-policy job trains no student; name the checkpoint that is to generate "
                "in model.name",
            )


_IDLE: Final[tuple[tuple[tuple[str, ...], tuple[Any, ...], str], ...]] = (
    (("post_processor",), (), "an evaluator scores what the student says"),
    (("tools",), ([],), "the student samples one turn of text"),
    (("parallelism",), (1,), "a training run is one unit, on one worker"),
    (("shard_size",), (), "a training run is one unit, not rows cut into shards"),
    (
        ("generation", "max_batch_size"),
        (),
        "groups_per_batch times group_size samples are in flight at a time; set those instead",
    ),
    (
        ("generation", "upload_every"),
        (0,),
        "the adapter is published at the end; save_every keeps checkpoints before it",
    ),
    (
        ("output", "format"),
        ("jsonl",),
        "it leaves an adapter, and `spider download --format` gives its metrics in any format",
    ),
    (("output", "hf", "config_name"), (), "a model repository has no configurations"),
    (("model", "pricing"), ({},), "a training run counts tokens, not dollars"),
)
"""Keys that training has no use for: path, values that ask for nothing, and why."""


def _idle_in_training(job: Any) -> Iterator[Complaint]:
    for path, harmless, why in _IDLE:
        value = _get(job, *path)
        if value is not None and value not in harmless:
            yield path, f"{path[-1]} is not used by an on-policy job: {why}; remove it"


def _training_rules(job: Any, options: Any) -> Iterator[Complaint]:
    under: Path = ("generation", "on_policy_options")
    own = _get(options, "seed")
    for path in (("generation", "seed"), ("generation", "parameters", "seed")):
        value = _get(job, *path)
        if own is not None and value is not None and value != own:
            yield (*under, "seed"), f"differs from {'.'.join(path)}; keep one of the two"
    if _get(options, "wandb_project") is None:
        for key, default in (("wandb_name", None), ("tracker", OnPolicyOptions.tracker)):
            if _get(options, key) not in (None, default):
                yield (*under, key), f"{key} is only used with wandb_project; set that or remove it"
    groups, substeps = _get(options, "groups_per_batch"), _get(options, "num_substeps")
    size = _get(options, "group_size")
    if isinstance(groups, int) and isinstance(substeps, int):
        samples = groups * (size if isinstance(size, int) else OnPolicyOptions.group_size)
        if substeps > samples > 0:
            yield (
                (*under, "num_substeps"),
                f"a batch of {samples} samples cannot be cut into {substeps} steps; lower it",
            )


def _checkpoints(job: Any, options: Any) -> Iterator[Complaint]:
    one = _get(job, "model", "student_checkpoint_path")
    other = _get(options, "student_checkpoint_path")
    if one is not None and other is not None and one != other:
        yield (
            ("generation", "on_policy_options", "student_checkpoint_path"),
            "differs from model.student_checkpoint_path; keep one of the two",
        )


def swe_rules(swe: Any) -> Iterator[Complaint]:
    """What is wrong with a SWE job beyond single values."""
    pattern = _get(swe, "instance_filter")
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            yield ("instance_filter",), f"no regular expression: {error}; write \\ before . + ( ["
    if _get(swe, "push_filter") == "resolved" and _get(swe, "evaluate") in (None, False):
        yield ("push_filter",), "push_filter: resolved needs evaluate: true; set it"
    one, total = _get(swe, "max_budget_per_instance"), _get(swe, "max_budget_total")
    if isinstance(one, int | float) and isinstance(total, int | float) and one > total > 0:
        yield (
            ("max_budget_total",),
            f"less than max_budget_per_instance ({one:g}), which each instance sets aside when it "
            "begins: none ever would; raise it",
        )
    yield from _condensing(_get(swe, "condenser"))
    if _get(swe, "hf_repo_id") is None:
        for key in ("hf_private", "hf_config_name", "push_filter"):
            if _get(swe, key) not in (None, False, SweConfig.push_filter):
                yield (key,), f"{key} is only used with hf_repo_id; set that or remove {key}"


def _condensing(options: Any) -> Iterator[Complaint]:
    """A condenser keeps the first events and half of the size: something must be left between."""
    if not isinstance(options, dict):
        return
    size, keep = options.get("max_size", 240), options.get("keep_first", 2)
    if isinstance(size, int) and isinstance(keep, int) and size // 2 - keep <= 1:
        yield (
            ("condenser", "max_size"),
            f"half of it ({size // 2}) must be more than keep_first ({keep}) and one; raise it",
        )


def check_submittable(config: Job) -> None:
    """Raise ConfigError unless this version can run the job as it is about to be submitted.

    Called once the processors are known: a file alone may leave the pre-processor to the client.
    """
    problems = list(_obstacles(config))
    if problems:
        raise ConfigError(problems)


def _obstacles(config: Job) -> Iterator[Problem]:
    if isinstance(config, SweConfig):
        return
    if not config.generation.on_policy and config.model.provider not in _GENERATING:
        yield Problem(
            "job.model.provider",
            f"provider {config.model.provider} is not built yet for off-policy jobs; use "
            f"{', '.join(_GENERATING)}",
        )
    if config.tools:
        yield Problem("job.tools", "tools are not built yet in this version; submit without them")
    if config.generation.on_policy:
        yield from _untrainable(config)
    functions = (config.pre_processor, config.post_processor, config.evaluator)
    last = "evaluator" if config.generation.on_policy else "post_processor"
    if not any(functions) and not config.tools:
        for key in ("packages", "env"):
            if getattr(config.runtime, key):
                yield Problem(
                    f"job.runtime.{key}",
                    f"runtime.{key} is for user functions, and the job has none; give a "
                    f"pre_processor or {last}, or remove it",
                )
    for key in ("revision", "config_name") if config.source.inputs else ():
        if getattr(config.source, key) is not None:
            yield Problem(f"job.source.{key}", f"uploaded files have no {key}; remove it")
    if config.source.field is None and config.pre_processor is None:
        yield Problem(
            "job.source.field",
            "nothing says what the prompt is; name a column in source.field or give a "
            "pre_processor",
        )


def _untrainable(config: JobConfig) -> Iterator[Problem]:
    options = config.generation.on_policy_options
    assert options is not None  # a rule of the format
    if config.model.provider not in _TRAINING:
        yield Problem(
            "job.model.provider",
            f"provider {config.model.provider} trains no student; use {', '.join(_TRAINING)}",
        )
    names = [teacher.name for teacher in options.teacher]
    for number, teacher in enumerate(options.teacher):
        path = f"job.generation.on_policy_options.teacher.{number}"
        if teacher.name in names[:number]:
            yield Problem(
                f"{path}.name",
                f"two teachers are called {teacher.name}, and their figures could not be told "
                "apart; give one row-routing `when` with a list of values instead",
            )
        if (teacher.provider or config.model.provider) in _RUN_HERE:
            for key in ("base_url", "api_key", "api_key_env"):
                # vLLM scores in the worker, or behind an address that is given.
                served = teacher.base_url and (teacher.provider or config.model.provider) == "vllm"
                if getattr(teacher, key) and not served:
                    yield Problem(
                        f"{path}.{key}",
                        f"provider {teacher.provider or config.model.provider} runs the teacher in "
                        "the worker, without address or key; a teacher behind an address takes "
                        "provider vllm (with base_url), openai or tinker",
                    )
    if config.model.provider in _RUN_HERE:
        for key in ("api_key", "api_key_env"):
            if getattr(options, key):
                yield Problem(
                    f"job.generation.on_policy_options.{key}",
                    "is the key of the service that trains the student, and provider "
                    f"{config.model.provider} trains it in the worker; remove it (a teacher's key "
                    "belongs to the teacher)",
                )


def _get(document: Any, *path: str) -> Any:
    """The value at ``path``, None where there is none."""
    for key in path:
        if not isinstance(document, dict):
            return None
        document = document.get(key)
    return document
