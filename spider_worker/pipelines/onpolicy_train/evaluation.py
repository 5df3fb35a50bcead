"""Held-out figures: the KL to the teachers on prompts that training leaves out, and the score of
the user's evaluator on greedy answers to them."""

from __future__ import annotations

__all__ = ["Evaluation"]

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from spider_sdk.errors import FatalJobError, RowError
from spider_worker.pipelines.onpolicy_train.batch import BatchMaker
from spider_worker.pipelines.onpolicy_train.parts import ModelText
from spider_worker.pipelines.onpolicy_train.prompts import Prompt
from spider_worker.pipelines.onpolicy_train.record import coverage, kl_figures
from spider_worker.sandbox.base import Sandbox
from spider_worker.tokens import SampledTokens, SampleParams, TokenEngine

#: The step of the seeds that evaluations sample with, so that every one draws alike.
_SEEDS = -1


class Evaluation:
    """``maker`` samples one completion a prompt; ``params`` is how the user samples."""

    def __init__(
        self,
        maker: BatchMaker,
        student: ModelText,
        params: SampleParams,
        prompts: Sequence[Prompt],
        weights: Mapping[str, float],
        evaluator: Sandbox | None,
    ) -> None:
        self._maker = maker
        self._student = student
        self._greedy = dataclasses.replace(params, temperature=0.0, top_p=1.0, top_k=0, seed=None)
        self._prompts = prompts
        self._weights = weights
        self._evaluator = evaluator

    @property
    def possible(self) -> bool:
        return bool(self._prompts)

    async def run(self, sampler: TokenEngine) -> dict[str, float]:
        """``eval/kl`` and its kin where a teacher could score anything, ``eval/score`` with an
        evaluator."""
        batch = await self._maker.make(sampler, self._prompts, _SEEDS)
        figures = {
            f"eval/{name}": value
            for name, value in kl_figures(batch.judgements, self._weights).items()
        }
        figures["eval/coverage"] = coverage(batch.rollouts, batch.judgements)
        if batch.refused:
            figures["eval/prompts_refused"] = float(len(batch.refused))
        if self._evaluator is not None:
            figures |= await self._scores(sampler, self._evaluator)
        return figures

    async def _scores(self, sampler: TokenEngine, evaluator: Sandbox) -> dict[str, float]:
        rows, failed = [], 0
        for prompt, answer in zip(self._prompts, await self._answers(sampler), strict=True):
            if answer is None:
                failed += 1
                continue
            rows.append(
                {
                    **prompt.prepared.fields,
                    "prompt": prompt.prepared.prompt,
                    "messages": prompt.prepared.messages,
                    "completion": self._student.decode(answer.tokens),
                    "finish_reason": answer.stop_reason,
                }
            )
        sums: dict[str, list[float]] = {}
        for outcome in await evaluator.call(rows):
            if outcome.error is not None:
                raise FatalJobError(f"the evaluator failed: {outcome.error.message}")
            for name, value in _score(outcome.value).items():
                sums.setdefault(name, []).append(value)
        figures = {f"eval/{name}": sum(values) / len(values) for name, values in sums.items()}
        if failed:
            figures["eval/prompts_refused"] = float(failed)
        return figures

    async def _answers(self, sampler: TokenEngine) -> list[SampledTokens | None]:
        async def answer(prompt: Prompt) -> SampledTokens | None:
            try:
                tokens = self._student.render(prompt.prepared.messages)
                return (await sampler.sample(tokens, 1, self._greedy))[0]
            except RowError:
                return None  # counted: the prompt is too long, or the template refuses it

        return await asyncio.gather(*map(answer, self._prompts))


def _score(value: Any) -> dict[str, float]:
    """A number or a truth value is the score; an object may name several, ``score`` among them.

    Raises FatalJobError for anything else.
    """
    values = value if isinstance(value, Mapping) else {"score": value}
    figures = {}
    for name, one in values.items():
        if not isinstance(one, int | float):
            raise FatalJobError(
                f"the evaluator returned {one!r} as {name}: expected a number or true or false, or"
                ' an object of them such as {"score": 1.0}'
            )
        figures[str(name)] = float(one)
    return figures
