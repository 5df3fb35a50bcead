"""The local trainer on a GPU: the same numbers as on the CPU, and what only a GPU shows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spider_worker.engines.tokens.torch_engine import TorchTokenEngine
from spider_worker.tokens import SampleParams
from spider_worker.torch_models.scoring import chunks
from spider_worker.trainers.base import AdamParams, ForwardBackward, Loss
from spider_worker.trainers.local import LocalTrainer
from tests.support.tiny_model import make_tiny_model
from tests.support.training import PROMPTS, datum, roll_out

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and make gpu"),
]

Start = Callable[..., LocalTrainer]
DATA = [
    datum(PROMPTS[0], (8, 17, 44, 44), (-3.0, -4.0, -5.0, -6.0), (1.0, -0.5, 0.25, 2.0)),
    datum(PROMPTS[2], (1, 2, 3), (-6.0,) * 3, (1.0, -1.0, 1.0)),
]


def steps(
    runner: asyncio.Runner, trainer: LocalTrainer, count: int = 3, rate: float = 1e-3
) -> list[ForwardBackward]:
    found = []
    for _ in range(count):
        found.append(runner.run(trainer.forward_backward(DATA, Loss("ppo"))))
        runner.run(trainer.optim_step(AdamParams(rate)))
    return found


def test_a_gpu_computes_what_the_cpu_does(start: Start, runner: asyncio.Runner) -> None:
    ours = steps(runner, start(device="cuda", dtype="float32"))
    theirs = steps(runner, start(device="cpu"))
    for one, other in zip(ours, theirs, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=2e-3)
        for mine, cpu in zip(one.logprobs, other.logprobs, strict=True):
            np.testing.assert_allclose(mine, cpu, atol=2e-3)


def test_samples_carry_the_policy_s_own_logprobs(start: Start, runner: asyncio.Runner) -> None:
    for dtype, tolerance in (("float32", 2e-3), ("bfloat16", 0.25)):
        trainer = start(device="cuda", dtype=dtype)
        steps(runner, trainer)
        rolled = runner.run(roll_out(runner.run(trainer.sampler())))
        data = [datum(prompt, sample.tokens) for prompt, sample in rolled]
        scored = runner.run(trainer.forward(data))
        for (_, sample), one, logprobs in zip(rolled, data, scored, strict=True):
            np.testing.assert_allclose(sample.logprobs, logprobs[one.mask], atol=tolerance)


def test_a_state_is_resumed_on_the_gpu(
    start: Start, runner: asyncio.Runner, tmp_path: Path
) -> None:
    first = start(device="cuda", dtype="float32")
    steps(runner, first)
    state = runner.run(first.save_state(tmp_path))
    second = start(device="cuda", dtype="float32", seed=8)
    runner.run(second.load_state(state, tmp_path))
    for one, other in zip(steps(runner, first), steps(runner, second), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_checkpointing_and_micro_batches_change_no_gradient(
    start: Start, runner: asyncio.Runner
) -> None:
    plain = steps(runner, start(device="cuda", dtype="float32"))
    frugal = start(
        device="cuda", dtype="float32", gradient_checkpointing=True, micro_batch_tokens=8
    )
    for one, other in zip(plain, steps(runner, frugal), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=2e-3)


def test_memory_is_given_back(start: Start, runner: asyncio.Runner) -> None:
    before = torch.cuda.memory_allocated()
    trainer = start(device="cuda")
    steps(runner, trainer)
    assert torch.cuda.memory_allocated() > before
    runner.run(trainer.close())
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


def test_logits_of_a_large_vocabulary_exist_in_pieces(
    start: Start, runner: asyncio.Runner, tmp_path: Path
) -> None:
    # 8,192 positions of 32,768 logits are a gigabyte in float32, and several times that with
    # what autograd would keep; in pieces it is a fraction.
    model = make_tiny_model(tmp_path, vocabulary=32_768, hidden=64, layers=1, context=4096)
    trainer = start(model=model, device="cuda")
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, 32_768, 2048)]
    data = [datum((5, 9), tokens, (-6.0,) * 2048) for _ in range(4)]
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    runner.run(trainer.forward_backward(data, Loss()))
    peak = torch.cuda.max_memory_allocated() - base
    assert peak < 8192 * 32_768 * 4
    assert len(list(chunks(8192, 32_768))) > 1


def test_a_teacher_on_the_gpu_scores_as_on_the_cpu(
    runner: asyncio.Runner, tiny_model: Path
) -> None:
    async def score(device: str) -> tuple[Any, Any]:
        engine = TorchTokenEngine(
            str(tiny_model), parameters={"device": device, "dtype": "float32"}
        )
        await engine.start()
        try:
            scores = await engine.compute_logprobs((*PROMPTS[1], 4, 8), topk=4)
            (greedy,) = await engine.sample(PROMPTS[0], 1, SampleParams(8, temperature=0.0))
        finally:
            await engine.close()
        return scores, greedy

    (gpu, said), (cpu, also) = runner.run(score("cuda")), runner.run(score("cpu"))
    np.testing.assert_allclose(gpu.logprobs[1:], cpu.logprobs[1:], atol=2e-3)
    np.testing.assert_allclose(gpu.topk.logprobs[1:], cpu.topk.logprobs[1:], atol=2e-3)
    assert said.tokens == also.tokens
