"""What a vLLM is started with, on machines that the tests need not run on."""

from __future__ import annotations

from typing import Any

import pytest

from spider_sdk.errors import NotSupported
from spider_worker.engines import vllm_options
from spider_worker.engines.tokens.vllm import VllmAdapterServer, VllmTokenEngine
from spider_worker.engines.tokens.vllm_arguments import (
    CONTROLLED,
    Memory,
    check_arguments,
    engine_arguments,
    lora_slot,
    process_environment,
)

GIB = 1 << 30
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def made(
    arguments: dict[str, Any] | None = None,
    *,
    slot: int | None = None,
    free: float | None = None,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    memory = None if free is None else Memory(int(free * 80 * GIB), 80 * GIB)
    return engine_arguments(
        arguments or {}, slot=slot, memory=memory, environment=environment or {}
    )


@pytest.fixture
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_options, "is_cpu_build", lambda: True)


@pytest.mark.parametrize(
    ("rank", "slot"), [(1, 1), (2, 8), (8, 8), (9, 16), (128, 128), (257, 320), (512, 512)]
)
def test_a_rank_gets_the_smallest_slot_that_holds_it(rank: int, slot: int) -> None:
    assert lora_slot(rank, RANKS) == slot


def test_on_a_gpu_no_adapter_is_served_in_full_precision() -> None:
    with pytest.raises(NotSupported, match=r"parameters\.dtype: .* half precision"):
        made({"dtype": "float32"}, slot=8, free=1.0)
    assert made({"dtype": "bfloat16"}, slot=8, free=1.0)["dtype"] == "bfloat16"
    assert made({"dtype": "float32"}, slot=8)["dtype"] == "float32"
    assert made({"dtype": "float32"}, free=1.0)["dtype"] == "float32"  # a teacher has none


def test_a_rank_above_all_slots_is_refused() -> None:
    with pytest.raises(NotSupported, match="lora_rank: vLLM serves adapters up to rank 512"):
        lora_slot(513, RANKS)


@pytest.mark.parametrize(
    ("free", "share"), [(1.0, 0.4), (0.96, 0.4), (0.9, 0.4), (0.6, 0.3), (0.1, 0.05)]
)
def test_a_students_sampler_leaves_the_trainer_its_share(free: float, share: float) -> None:
    assert made(slot=8, free=free)["gpu_memory_utilization"] == pytest.approx(share)


@pytest.mark.parametrize(("free", "share"), [(1.0, None), (0.96, None), (0.6, 0.3), (0.3, 0.15)])
def test_a_teacher_takes_half_of_what_others_left(free: float, share: float | None) -> None:
    """None: vLLM's own, on a GPU that it has for itself."""
    assert made(free=free).get("gpu_memory_utilization") == share


def test_memory_can_be_set() -> None:
    for slot in (None, 8):
        found = made({"gpu_memory_utilization": 0.7}, slot=slot, free=0.5)
        assert found["gpu_memory_utilization"] == 0.7


@pytest.mark.usefixtures("_cpu")
def test_on_the_cpu_the_cache_is_bounded_unless_it_is_sized() -> None:
    assert made()["kv_cache_memory_bytes"] == 4 * GIB
    assert made()["dtype"] == "float32"
    assert made({"kv_cache_memory_bytes": GIB})["kv_cache_memory_bytes"] == GIB
    assert made({"dtype": "bfloat16"})["dtype"] == "bfloat16"
    assert "kv_cache_memory_bytes" not in made({"gpu_memory_utilization": 0.1})
    assert "kv_cache_memory_bytes" not in made(environment={"VLLM_CPU_KVCACHE_SPACE": "2"})


def test_on_a_gpu_the_type_is_the_models() -> None:
    assert not {"dtype", "enforce_eager"} & made(free=1.0).keys()


@pytest.mark.usefixtures("_cpu")
def test_on_the_cpu_nothing_is_compiled_unless_it_is_asked_for() -> None:
    assert made()["enforce_eager"] is True
    assert process_environment({}, {})["TORCHDYNAMO_DISABLE"] == "1"
    asked = {"enforce_eager": False}
    assert made(asked)["enforce_eager"] is False
    assert "TORCHDYNAMO_DISABLE" not in process_environment(asked, {})


def test_the_process_is_one_and_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_options, "is_cpu_build", lambda: False)
    assert process_environment({}, {"PATH": "/bin", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}) == {
        "PATH": "/bin",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    assert process_environment({}, {"VLLM_NO_USAGE_STATS": "0"})["VLLM_NO_USAGE_STATS"] == "0"


def test_logprobs_are_those_of_the_distribution_that_is_drawn_from() -> None:
    assert made()["logprobs_mode"] == made(slot=8)["logprobs_mode"] == "processed_logprobs"


def test_only_a_students_sampler_has_room_for_an_adapter_and_for_one() -> None:
    assert made(slot=16) | {"seed": 0} == {
        **made(slot=16),
        "seed": 0,
        "enable_lora": True,
        "max_lora_rank": 16,
        "max_loras": 1,
        "max_cpu_loras": 1,
    }
    assert "enable_lora" not in made()


def test_few_tokens_are_scored_at_once_but_one_of_each_sequence() -> None:
    assert made()["max_num_batched_tokens"] == 2048
    assert made({"max_num_seqs": 4096})["max_num_batched_tokens"] == 4096
    assert made({"max_num_batched_tokens": 512})["max_num_batched_tokens"] == 512
    assert "max_num_batched_tokens" not in made(slot=8)


def test_seeds_of_engines_differ() -> None:
    assert len({made()["seed"] for _ in range(8)}) > 1
    assert made({"seed": 3})["seed"] == 3


@pytest.mark.parametrize("name", CONTROLLED)
def test_what_the_engines_set_themselves_is_refused_by_name(name: str) -> None:
    with pytest.raises(NotSupported, match=rf"here\.{name} cannot be set"):
        check_arguments({name: 1}, where="here")
    with pytest.raises(NotSupported, match=rf"teacher\.parameters\.{name}"):
        VllmTokenEngine("tiny", arguments={name: 1})
    with pytest.raises(NotSupported, match=rf"model\.parameters\.vllm\.{name}"):
        VllmAdapterServer("tiny", lora_rank=4, arguments={name: 1})


@pytest.mark.parametrize("name", ["download_dir", "worker_cls", "data_parallel_rank", "model"])
def test_what_reaches_into_the_worker_is_refused_by_name(name: str) -> None:
    with pytest.raises(NotSupported, match=rf"model\.parameters\.vllm\.{name} cannot be set"):
        VllmAdapterServer("tiny", lora_rank=4, arguments={name: 1})


def test_the_controlled_are_arguments_of_this_vllm() -> None:
    """Or were of one: a name that no version has would protect nothing."""
    pytest.importorskip("vllm")
    import dataclasses

    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    assert set(CONTROLLED) - known <= {"lora_modules"}
