"""What a vLLM that scores, or one that samples for a trainer, is started with.

Such an engine is not alone. On a GPU it shares memory with the trainer, which takes what is left
when both models are loaded, and with other engines; on the CPU it shares the machine's. vLLM
would take nine tenths of either for itself.
"""

from __future__ import annotations

__all__ = [
    "CONTROLLED",
    "Memory",
    "check_arguments",
    "engine_arguments",
    "lora_slot",
    "process_environment",
]

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

from spider_sdk.errors import NotSupported
from spider_worker.engines import vllm_options
from spider_worker.engines.options import refuse

#: Share of a GPU's memory that goes to a student's sampler: its copy of the base model and the
#: cache of keys and values. The trainer has the rest.
STUDENT_SHARE: Final = 0.4
#: A GPU with so much of its memory free is used by nobody else.
_IDLE: Final = 0.95
#: Of the memory that others have left, a teacher takes so much: training needs more than its
#: weights.
_TEACHER_SHARE: Final = 0.5
#: Bytes of keys and values on the CPU.
_CPU_CACHE: Final = 4 << 30
#: Tokens of a scoring step. Their logits are all in memory at once: 2,048 of a vocabulary of
#: 150,000 are 1.2 GB in float32.
_SCORED_AT_ONCE: Final = 2048
_FULL: Final = ("float32", "float")

CONTROLLED: Final = {
    **dict.fromkeys(
        (
            "enable_lora",
            "max_lora_rank",
            "max_loras",
            "max_cpu_loras",
            "lora_dtype",
            "lora_modules",
            "lora_target_modules",
            "default_mm_loras",
        ),
        "the trainer serves its own adapter, and a teacher has none",
    ),
    "logprobs_mode": "log-probabilities are those that tokens are drawn with",
    "speculative_config": "log-probabilities of drafted tokens are not the policy's",
}
"""Arguments that these engines set themselves, or cannot work with, and why."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Of the first GPU, in bytes."""

    free: int
    total: int


def check_arguments(arguments: Mapping[str, Any], *, where: str) -> None:
    """Raises NotSupported for what no job may set here. Imports nothing heavy; names that vLLM
    does not know are refused when it starts."""
    for name, reason in CONTROLLED.items():
        if name in arguments:
            refuse(f"{where}.{name} cannot be set: {reason}.")
    vllm_options.check_reach(arguments, where=where)


def lora_slot(rank: int, ranks: Sequence[int]) -> int:
    """The smallest of the ``ranks`` that vLLM has room for which holds an adapter of ``rank``.
    Raises NotSupported."""
    fitting = [one for one in sorted(ranks) if one >= rank]
    if not fitting:
        raise NotSupported(
            f"lora_rank: vLLM serves adapters up to rank {max(ranks)}, not {rank}. Lower it, or set"
            " model.provider to transformers, which samples without vLLM."
        )
    return fitting[0]


def engine_arguments(
    arguments: Mapping[str, Any],
    *,
    slot: int | None,
    memory: Memory | None,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """EngineArgs by name. ``slot`` None: the engine scores; otherwise it samples under an adapter
    of up to this rank. ``memory`` None: no GPU. What the job says comes last. Raises NotSupported
    for a precision that adapters are not served in."""
    made: dict[str, Any] = {
        "disable_log_stats": True,
        # vLLM's default seed is 0: every runner would draw the same numbers.
        "seed": secrets.randbits(31),
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",
    }
    if slot is None:
        least = int(arguments.get("max_num_seqs") or 0)
        made["max_num_batched_tokens"] = max(_SCORED_AT_ONCE, least)
    else:
        made |= {"enable_lora": True, "max_lora_rank": slot, "max_loras": 1, "max_cpu_loras": 1}
        if memory is not None and arguments.get("dtype") in _FULL:
            refuse(
                "model.parameters.dtype: on a GPU vLLM serves adapters in half precision alone, not"
                " in float32. Set model.parameters.vllm.dtype to bfloat16, or model.provider to"
                " transformers, which samples without vLLM."
            )
    if memory is not None:
        share = _share(memory, student=slot is not None)
        if share is not None:
            made["gpu_memory_utilization"] = share
    elif vllm_options.is_cpu_build():
        # As everything here computes on the CPU, and without a compiler, which may not be there.
        made |= {"dtype": "float32", "enforce_eager": True}
        sized = {"gpu_memory_utilization", "kv_cache_memory_bytes"} & arguments.keys()
        if not sized and not environment.get("VLLM_CPU_KVCACHE_SPACE"):
            made["kv_cache_memory_bytes"] = _CPU_CACHE
    return {**made, **arguments}


def process_environment(
    arguments: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, str]:
    """That of the engine's process."""
    made = {
        **environment,
        # With the engine's core in it too, it is one process, which ends as a whole.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    # vLLM's usage reports leave the machine, and a job's owner was not asked.
    made.setdefault("VLLM_NO_USAGE_STATS", "1")
    if vllm_options.is_cpu_build() and arguments.get("enforce_eager", True):
        # It would still compile what counts ranks, which takes a compiler and half a minute.
        made.setdefault("TORCHDYNAMO_DISABLE", "1")
    return made


def _share(memory: Memory, *, student: bool) -> float | None:
    """``gpu_memory_utilization``; None is vLLM's own, of a GPU that it has for itself."""
    free = memory.free / memory.total
    if student:
        return STUDENT_SHARE if free >= _IDLE else round(min(STUDENT_SHARE, free / 2), 3)
    return None if free >= _IDLE else round(_TEACHER_SHARE * free, 3)
