"""One batch: prompts that the student answers, the teachers score, and training sequences."""

from __future__ import annotations

__all__ = ["Batch", "BatchMaker", "request_seed"]

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import Sequence

import numpy as np

from spider_sdk.errors import RowError
from spider_worker.distill.advantages import position_baseline
from spider_worker.pipelines.onpolicy_train.parts import ModelText
from spider_worker.pipelines.onpolicy_train.prompts import Prompt
from spider_worker.pipelines.onpolicy_train.supervision import Judgement, Rollout, Supervision
from spider_worker.tokens import SampleParams, TokenEngine
from spider_worker.trainers.base import Datum


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """``rollouts`` and ``judgements`` are parallel, in the order of the prompts; ``data`` holds
    a training sequence for each rollout that a teacher scored. ``seconds_score`` is what scoring
    took after the last sample had come: the rest of it went on beside the sampling."""

    rollouts: Sequence[Rollout]
    judgements: Sequence[Judgement]
    data: Sequence[Datum]
    refused: Sequence[str]  #: prompts that the student could not take, and why
    seconds_sample: float
    seconds_score: float

    def why_empty(self) -> str:
        """Why ``data`` is empty, where it is: of several reasons the first."""
        reasons = [*self.refused, *(why for one in self.judgements for why in one.refused)]
        return reasons[0] if reasons else "every completion is empty"

    @property
    def tokens(self) -> int:
        """Sampled tokens."""
        return sum(len(rollout.sample.tokens) for rollout in self.rollouts)


def request_seed(seed: int, step: int, index: int) -> int:
    """The seed of a prompt's samples: the same in every attempt at a step, and another in every
    step, in 63 bits."""
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class BatchMaker:
    """``group_size`` samples a prompt. ``params`` is how to sample, without a seed."""

    def __init__(
        self,
        student: ModelText,
        supervision: Supervision,
        params: SampleParams,
        *,
        group_size: int,
        seed: int,
        baseline: str,
    ) -> None:
        self._student = student
        self._supervision = supervision
        self._params = params
        self._group_size = group_size
        self._seed = seed
        self._baseline = baseline

    async def make(self, sampler: TokenEngine, prompts: Sequence[Prompt], step: int) -> Batch:
        """Each group is scored as soon as it is sampled."""
        began = time.monotonic()
        sampled = began
        refused: list[str] = []

        async def group(prompt: Prompt) -> tuple[list[Rollout], list[Judgement]]:
            nonlocal sampled
            try:
                rollouts = await self._sample(sampler, prompt, step)
            except RowError as error:
                refused.append(f"row {prompt.index}: {error.message}")
                return [], []
            sampled = time.monotonic()
            return rollouts, await asyncio.gather(*map(self._supervision.judge, rollouts))

        groups = await asyncio.gather(*map(group, prompts))
        rollouts = [rollout for group_rollouts, _ in groups for rollout in group_rollouts]
        judgements = [judgement for _, found in groups for judgement in found]
        data = self._data(rollouts, judgements)
        ended = time.monotonic()
        return Batch(rollouts, judgements, data, refused, sampled - began, ended - sampled)

    async def _sample(self, sampler: TokenEngine, prompt: Prompt, step: int) -> list[Rollout]:
        tokens = tuple(self._student.render(prompt.prepared.messages))
        seed = request_seed(self._seed, step, prompt.index)
        params = dataclasses.replace(self._params, seed=seed)
        samples = await sampler.sample(tokens, self._group_size, params)
        return [Rollout(prompt, tokens, sample) for sample in samples]

    def _data(self, rollouts: Sequence[Rollout], judgements: Sequence[Judgement]) -> list[Datum]:
        pairs = [
            (rollout, judgement)
            for rollout, judgement in zip(rollouts, judgements, strict=True)
            if judgement.verdicts and rollout.sample.tokens
        ]
        advantages = [judgement.advantages for _, judgement in pairs]
        if self._baseline == "position":
            advantages = position_baseline(advantages)
        return [
            _datum(rollout, judgement, values)
            for (rollout, judgement), values in zip(pairs, advantages, strict=True)
        ]


def _datum(rollout: Rollout, judgement: Judgement, advantages: np.ndarray) -> Datum:
    prompt, sample = len(rollout.prompt_tokens), rollout.sample
    count = prompt + len(sample.tokens)
    tokens = np.fromiter((*rollout.prompt_tokens, *sample.tokens), dtype=np.int64, count=count)
    logprobs, weights = np.zeros((2, count), dtype=np.float32)
    logprobs[prompt:] = sample.logprobs
    weights[prompt:] = advantages
    mask = np.zeros(count, dtype=bool)
    mask[prompt:] = True
    targets = judgement.targets
    if targets is not None:
        weights[prompt + targets.positions] = 0.0
        targets = dataclasses.replace(targets, positions=targets.positions + prompt)
    return Datum(tokens, logprobs, weights, mask, targets)
