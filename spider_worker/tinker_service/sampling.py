"""A TokenEngine over what a Tinker-compatible service samples from."""

from __future__ import annotations

__all__ = ["ServiceSampler"]

import asyncio
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from spider_sdk.errors import Diverged, EngineUnavailable, RowError
from spider_worker.tinker_service.errors import Refusal
from spider_worker.tinker_service.service import TinkerService
from spider_worker.tokens import (
    Ids,
    SampledTokens,
    SampleParams,
    TokenEngineInfo,
    TokenScores,
    TopK,
)

_TOO_LONG: Final = re.compile(r"context|too long|max_tokens|length", re.IGNORECASE)


class ServiceSampler:
    """``client`` is the SDK's SamplingClient. ``fresh`` raises when the weights behind it are no
    longer those that are meant.

    Log-probabilities of samples are what the service returns, which is the policy's own, whatever
    the temperature.
    """

    def __init__(
        self,
        service: TinkerService,
        client: Any,
        info: TokenEngineInfo,
        *,
        fresh: Callable[[], None] = lambda: None,
    ) -> None:
        self._service, self._client, self._fresh = service, client, fresh
        self._info = info

    @property
    def info(self) -> TokenEngineInfo:
        return self._info

    async def start(self) -> None:
        """The service is there already."""

    async def close(self) -> None:
        """Whoever opened the service closes it."""

    async def sample(self, prompt: Ids, n: int, params: SampleParams) -> list[SampledTokens]:
        tokens = _checked(prompt)
        limit = self._limit(tokens, n, params)
        if params.seed is None:
            return await self._sample(tokens, n, params, limit, None)
        # One request a sample: what a service makes of one seed for several is not said.
        seeds = [_mixed(tokens, params.seed, number) for number in range(n)]
        parts = await asyncio.gather(
            *(self._sample(tokens, 1, params, limit, seed) for seed in seeds)
        )
        return [sample for part in parts for sample in part]

    async def compute_logprobs(
        self,
        tokens: Ids,
        *,
        start: int = 1,  # noqa: ARG002 (the service scores every token)
        topk: int = 0,
    ) -> TokenScores:
        ids = _checked(tokens)
        context = self._info.context
        if context is not None and len(ids) > context:
            raise _overflow(len(ids), "does not fit", context)
        if len(ids) == 1:
            return TokenScores(_shifted([], 1), _topk([], 1, topk) if topk else None)
        try:
            answer = await self._ask(
                "scoring",
                ids,
                1,
                self._service.sdk.types.SamplingParams(max_tokens=1, temperature=1.0),
                include_prompt_logprobs=True,
                topk_prompt_logprobs=topk,
            )
        except Refusal as error:
            # Some servers leave them out of their answer, and some refuse the question.
            if topk and "topk" in error.detail:
                raise self._without_best() from error
            raise
        if answer.prompt_logprobs is None:
            raise EngineUnavailable(
                f"{self._service.name} returns no log-probabilities of a prompt"
            )
        logprobs = _shifted(answer.prompt_logprobs, len(ids))
        if not topk:
            return TokenScores(logprobs)
        if answer.topk_prompt_logprobs is None:
            raise self._without_best()
        return TokenScores(logprobs, _topk(answer.topk_prompt_logprobs, len(ids), topk))

    def _without_best(self) -> EngineUnavailable:
        return EngineUnavailable(
            f"{self._service.name} returns no most probable tokens of a prompt"
        )

    def _limit(self, prompt: Ids, n: int, params: SampleParams) -> int:
        if n < 1 or params.max_tokens < 1:
            raise ValueError(f"n and max_tokens count from 1, not {n} and {params.max_tokens}")
        context = self._info.context
        if context is None:
            return params.max_tokens
        if len(prompt) >= context:
            raise _overflow(len(prompt), "leaves no room for a sample in", context)
        return min(params.max_tokens, context - len(prompt))

    async def _sample(
        self, prompt: Ids, n: int, params: SampleParams, limit: int, seed: int | None
    ) -> list[SampledTokens]:
        options = self._service.sdk.types.SamplingParams(
            max_tokens=limit,
            seed=seed,
            stop=list(params.stop),  # without any, the service ends no sample
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k or -1,
        )
        answer = await self._ask("sampling", prompt, n, options)
        if len(answer.sequences) != n:
            raise EngineUnavailable(
                f"{self._service.name} returned {len(answer.sequences)} samples in the place of {n}"
            )
        return [self._sampled(sequence, params.stop) for sequence in answer.sequences]

    async def _ask(self, what: str, prompt: Ids, n: int, options: Any, **more: Any) -> Any:
        self._fresh()
        text = self._service.sdk.types.ModelInput.from_ints(list(prompt))
        try:
            return await self._service.call(what, self._client, "sample", text, n, options, **more)
        except Refusal as error:
            if error.status in (400, 422) and _TOO_LONG.search(error.detail):
                raise RowError(error.message, stage="generation", kind="context") from error
            raise

    def _sampled(self, sequence: Any, stop: Sequence[int]) -> SampledTokens:
        tokens = tuple(map(int, sequence.tokens))
        logprobs = sequence.logprobs
        if logprobs is None or len(logprobs) != len(tokens):
            raise EngineUnavailable(
                f"{self._service.name} returns no log-probability for each token that it samples;"
                " training needs them"
            )
        if np.isnan(drawn := np.asarray(logprobs, np.float32)).any():
            raise Diverged(
                f"samples of {self._service.name} have log-probabilities that are no numbers:"
                " training has diverged. Lower learning_rate, or set advantage_clip"
            )
        stopped = sequence.stop_reason == "stop"
        if stopped and (not tokens or tokens[-1] not in stop):
            raise EngineUnavailable(
                f"{self._service.name} ended a sample at a token that is not in it, or that it was"
                f" not asked to stop at (asked: {list(stop)}; the last: {list(tokens[-1:])}): the"
                " student could not be taught to stop"
            )
        return SampledTokens(tokens, drawn, "stop" if stopped else "length")


def _shifted(values: Sequence[float | None], count: int) -> NDArray[np.float32]:
    """``count`` log-probabilities, entry ``i`` that of token ``i``, from what a service returns:
    one for each token, the first of which means nothing, or one for each token but the first."""
    if len(values) not in (count, count - 1):
        raise EngineUnavailable(
            f"a Tinker service returned {len(values)} log-probabilities for {count} tokens"
        )
    found = np.full(count, np.nan, np.float32)
    given = list(values)[len(values) - count + 1 :]
    found[1:] = [np.nan if value is None else value for value in given]
    return found


def _topk(rows: Sequence[Any], count: int, k: int) -> TopK:
    """As ``_shifted``; a row is None or a list of (token, log-probability), in any order."""
    if len(rows) not in (count, count - 1):
        raise EngineUnavailable(
            f"a Tinker service returned the most probable tokens of {len(rows)} positions for"
            f" {count} tokens"
        )
    ids = np.full((count, k), -1, np.int64)
    logprobs = np.full((count, k), -np.inf, np.float32)
    given = list(rows)[len(rows) - count + 1 :]
    for position, row in enumerate(given, start=1):
        best = sorted(row or (), key=lambda pair: -pair[1])[:k]
        for place, (token, logprob) in enumerate(best):
            ids[position, place], logprobs[position, place] = token, logprob
    return TopK(ids, logprobs)


def _checked(tokens: Ids) -> tuple[int, ...]:
    ids = tuple(map(int, tokens))
    if not ids:
        raise RowError("there are no tokens", stage="generation", kind="empty")
    if min(ids) < 0:
        raise RowError(f"{min(ids)} is no token", stage="generation", kind="vocabulary")
    return ids


def _mixed(prompt: Ids, seed: int, number: int) -> int:
    """31 bits, which every server takes, that differ for each sample of each prompt."""
    text = f"{seed},{number}:".encode() + np.asarray(prompt, np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1


def _overflow(count: int, what: str, context: int) -> RowError:
    return RowError(
        f"a sequence of {count} tokens {what} the context of {context} tokens",
        stage="generation",
        kind="context",
    )
