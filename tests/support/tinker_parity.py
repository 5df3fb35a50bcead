"""The same rollouts at a Tinker-compatible server and under the local trainer, step by step."""

from __future__ import annotations

__all__ = ["STEPS", "Parity", "compare"]

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spider_worker.trainers.base import AdamParams, Datum, Loss, Trainer
from spider_worker.trainers.local import LocalTrainer
from spider_worker.trainers.tinker import TinkerTrainer
from tests.support.tinker_server import SERVER
from tests.support.training import datum, roll_out

#: The server of 0.25 trains one ``lora_A`` for the projections of queries, keys and values, where
#: PEFT has three. They begin alike, and gradients reach them from the second step on.
STEPS = 3 if SERVER == "0.16" else 2
ADAM = AdamParams(learning_rate=1e-3)


@dataclasses.dataclass(frozen=True)
class Parity:
    """The largest relative difference of the two over all steps: of the losses, and of the
    log-probabilities of single tokens. ``steps`` and ``tokens`` say over how many."""

    loss: float
    logprobs: float
    steps: int
    tokens: int


async def compare(model: Path, url: str, losses: Sequence[str]) -> dict[str, Parity]:
    """For each loss, both trainers from one LoRA start, ``STEPS`` steps on the same rollouts of
    different lengths."""
    found = {}
    for name in losses:
        theirs = TinkerTrainer(str(model), lora_rank=4, seed=11, base_url=url)
        ours = LocalTrainer(str(model), lora_rank=4, seed=12)
        await theirs.start()
        try:
            await ours.start()
            with tempfile.TemporaryDirectory() as folder:
                await theirs.save_adapter(Path(folder))
                await ours.load_weights(folder)
            found[name] = await _steps(theirs, ours, await _rollouts(theirs), Loss(name))
        finally:
            await theirs.close()
            await ours.close()
    return found


async def _rollouts(trainer: Trainer) -> list[Datum]:
    """Four samples of each prompt, cut to different lengths."""
    samples = await roll_out(await trainer.sampler(), seed=5, n=4, max_tokens=16)
    draw = np.random.default_rng(0)
    data = []
    for number, (prompt, sample) in enumerate(samples):
        kept = 5 + number % 12
        tokens, logprobs = sample.tokens[:kept], sample.logprobs[:kept]
        data.append(datum(prompt, tokens, logprobs, draw.normal(size=len(tokens)).tolist()))
    return data


async def _steps(theirs: Trainer, ours: Trainer, data: list[Datum], loss: Loss) -> Parity:
    worst_loss = worst_logprob = 0.0
    for _ in range(STEPS):
        one = await theirs.forward_backward(data, loss)
        two = await ours.forward_backward(data, loss)
        worst_loss = max(worst_loss, abs(one.loss - two.loss) / abs(two.loss))
        pairs = zip(one.logprobs, two.logprobs, data, strict=True)
        for found, wanted, sequence in pairs:
            known = wanted[sequence.mask]
            apart = np.abs(found[sequence.mask] - known) / np.abs(known)
            worst_logprob = max(worst_logprob, float(apart.max()))
        for trainer in (theirs, ours):
            await trainer.optim_step(ADAM)
    tokens = sum(int(sequence.mask.sum()) for sequence in data)
    return Parity(worst_loss, worst_logprob, STEPS, tokens)
