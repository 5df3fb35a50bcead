"""Rollouts and data for tests of trainers."""

from __future__ import annotations

__all__ = ["PROMPTS", "datum", "roll_out"]

import asyncio
from collections.abc import Sequence

import numpy as np

from spider_worker.tokens import SampledTokens, SampleParams, TokenEngine
from spider_worker.trainers.base import Datum, DenseTargets

PROMPTS = ((5, 9, 30, 41), (5, 9, 30, 41, 77, 120, 9), (300, 2))


async def roll_out(
    engine: TokenEngine,
    *,
    seed: int | None = 3,
    n: int = 2,
    max_tokens: int = 6,
    prompts: Sequence[tuple[int, ...]] = PROMPTS,
) -> list[tuple[tuple[int, ...], SampledTokens]]:
    """``n`` samples of each prompt, with their prompts."""
    params = SampleParams(max_tokens, seed=seed)
    groups = await asyncio.gather(*(engine.sample(prompt, n, params) for prompt in prompts))
    return [
        (prompt, sample) for prompt, group in zip(prompts, groups, strict=True) for sample in group
    ]


def datum(
    prompt: Sequence[int],
    tokens: Sequence[int],
    logprobs: Sequence[float] | None = None,
    advantages: float | Sequence[float] = 1.0,
    targets: DenseTargets | None = None,
) -> Datum:
    """Prompt and completion with everything on its place; ``logprobs`` None: 0."""
    start, count = len(prompt), len(prompt) + len(tokens)
    mask = np.arange(count) >= start
    old = np.zeros(count, np.float32)
    weights = np.zeros(count, np.float32)
    if logprobs is not None:
        old[start:] = logprobs
    weights[start:] = advantages
    return Datum(np.array([*prompt, *tokens], np.int64), old, weights, mask, targets)
