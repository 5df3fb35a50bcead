"""The student that is published is the one that was trained: vLLM, peft and the trainer agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spider_worker.engines.tokens.vllm import VllmAdapterServer
from spider_worker.tokens import SampleParams, TokenEngine
from spider_worker.trainers.base import AdamParams, Datum, Loss
from spider_worker.trainers.local import LocalTrainer
from tests.contract.token_engines.conftest import VLLM_MARKS, Run
from tests.support.reference import check_sample, load_reference
from tests.support.training import PROMPTS, datum, roll_out

pytestmark = [*VLLM_MARKS, pytest.mark.filterwarnings("ignore::UserWarning:peft")]


class Borrowed:
    """The session's server, which a trainer starts and closes as its own."""

    def __init__(self, server: VllmAdapterServer) -> None:
        self._server = server

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def serve(self, adapter: Path) -> TokenEngine:
        return await self._server.serve(adapter)


async def on_policy(trainer: LocalTrainer, seed: int) -> list[Datum]:
    """A batch of the student's samples, rewarded by what they are."""
    samples = await roll_out(await trainer.sampler(), seed=seed)
    return [
        datum(prompt, s.tokens, s.logprobs, [token % 3 - 1.0 for token in s.tokens])
        for prompt, s in samples
    ]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"]])
def test_a_published_adapter_serves_as_it_was_trained(
    adapter_server: VllmAdapterServer, tiny_model: Path, tmp_path: Path, run: Run[Any], targets: Any
) -> None:
    trainer = LocalTrainer(
        str(tiny_model),
        lora_rank=4,
        seed=7,
        parameters={"target_modules": targets},
        server=Borrowed(adapter_server),
    )
    run(trainer.start())
    for step in range(3):
        data = run(on_policy(trainer, step))
        # vLLM samples from the weights of now, and says with which probabilities.
        for logprobs, one in zip(run(trainer.forward(data)), data, strict=True):
            np.testing.assert_allclose(logprobs[one.mask], one.logprobs[one.mask], atol=1e-4)
        run(trainer.forward_backward(data, Loss()))
        run(trainer.optim_step(AdamParams(learning_rate=1e-2)))
    run(trainer.save_adapter(tmp_path))

    reference = load_reference(tiny_model, tmp_path)
    engine = run(adapter_server.serve(tmp_path))
    for prompt in PROMPTS:
        for sample in run(engine.sample(prompt, 2, SampleParams(8, seed=5))):
            check_sample(reference, prompt, sample, 1e-4)
            one = datum(prompt, sample.tokens, sample.logprobs)
            (own,) = run(trainer.forward([one]))
            np.testing.assert_allclose(own[one.mask], sample.logprobs, atol=1e-4)
    run(trainer.close())
