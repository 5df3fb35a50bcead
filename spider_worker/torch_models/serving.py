"""A model on one thread, for whoever waits: calls that come together are answered together.

Batches depend on what was called and not on when, so that a run that calls alike samples
alike, bit by bit: calls of one turn of the event loop (a ``gather``) make one batch, in order.
"""

from __future__ import annotations

__all__ = ["Batches", "Call", "ModelEngine"]

import asyncio
import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Generic, TypeVar

import numpy as np
import torch

from spider_sdk.errors import EngineUnavailable, PipelineError, RowError, SpiderError
from spider_worker.tokens import Ids, SampledTokens, SampleParams, TokenEngineInfo, TokenScores
from spider_worker.torch_models import decoding, scoring
from spider_worker.torch_models.causal import CausalModel
from spider_worker.torch_models.drawing import uniforms

W = TypeVar("W")
Lease = Callable[[], contextlib.AbstractContextManager[CausalModel]]

_BATCH_TOKENS: Final = 16384
#: Sequences that are sampled together at least and at most, and the bytes that they may take on the
#: CPU between the two: a large model is not faster with more of them, a small one is.
_LEAST: Final = 64
_MOST: Final = 256
_BYTES: Final = 1 << 30
#: Of a sequence and a token of the vocabulary: the logits, and what drawing makes of them.
_DRAWING_BYTES: Final = 24


@dataclasses.dataclass(eq=False, slots=True)
class Call(Generic[W]):
    """``future`` is of the event loop; whether it was cancelled may be asked on any thread."""

    work: W
    future: asyncio.Future[Any]


class Batches(Generic[W]):
    """``handle`` runs on ``executor``, for all calls that wait when it is free, and sets nothing:
    it returns an outcome for each."""

    def __init__(
        self,
        executor: concurrent.futures.Executor,
        handle: Callable[[Sequence[Call[W]]], Sequence[Any]],
    ) -> None:
        self._executor, self._handle = executor, handle
        self._waiting: list[Call[W]] = []
        self._task: asyncio.Task[None] | None = None

    async def submit(self, work: W) -> Any:
        """The outcome of ``work``; raised, where it is an exception."""
        loop = asyncio.get_running_loop()
        call = Call(work, loop.create_future())
        self._waiting.append(call)
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._drain(loop))
        return await call.future

    async def _drain(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting:
            seen = 0
            while len(self._waiting) > seen:  # until a turn of the loop has brought no more
                seen = len(self._waiting)
                await asyncio.sleep(0)
            batch = [call for call in self._waiting if not call.future.done()]
            self._waiting = []
            if not batch:
                continue
            try:
                outcomes = await loop.run_in_executor(self._executor, self._guarded, batch)
            except RuntimeError:  # the executor was shut down
                outcomes = [PipelineError("The model was closed.") for _ in batch]
            for call, outcome in zip(batch, outcomes, strict=True):
                if call.future.done():
                    continue
                if isinstance(outcome, Exception):
                    call.future.set_exception(outcome)
                else:
                    call.future.set_result(outcome)

    def _guarded(self, batch: Sequence[Call[W]]) -> Sequence[Any]:
        try:
            return self._handle(batch)
        except SpiderError as error:
            failure = error
        except torch.OutOfMemoryError as error:
            failure = EngineUnavailable(f"The device's memory is too small: {error}")
        except Exception as error:  # noqa: BLE001 - the boundary to the library
            failure = PipelineError(f"The model failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
        return [failure for _ in batch]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    prompt: tuple[int, ...]
    rows: list[decoding.Row]
    params: SampleParams


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Score:
    tokens: tuple[int, ...]
    start: int
    topk: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Distributions:
    tokens: tuple[int, ...]
    positions: Any  # (P,) int64


_Work = _Sample | _Score | _Distributions


def _together(model: CausalModel, rows: Sequence[decoding.Row]) -> int:
    """How many of ``rows`` are sampled together where the job does not say. It depends on them
    alone, so that a run that samples alike does so bit by bit."""
    if model.device.type != "cpu":
        return _MOST
    of_token = model.cache_bytes
    if of_token is None:
        return _LEAST
    longest = max(len(row.prompt) + row.limit for row in rows)
    of_row = longest * of_token + model.vocabulary * _DRAWING_BYTES
    return min(_MOST, max(_LEAST, _BYTES // of_row))


class ModelEngine:
    """LogitEngine over a model that somebody else holds: ``lease`` is entered on the thread of
    ``executor`` for the time of a batch and gives the model, or raises why there is none.
    ``parameters`` are checked ones (``MODEL_PARAMETERS``)."""

    def __init__(
        self,
        lease: Lease,
        executor: concurrent.futures.Executor,
        *,
        info: TokenEngineInfo,
        vocabulary: int,
        parameters: Mapping[str, Any],
    ) -> None:
        self._lease = lease
        self._info = info
        self._context = info.context or 0
        self._vocabulary = vocabulary
        self._max_batch: int | None = parameters.get("max_batch")
        self._batch_tokens: int = parameters.get("batch_tokens", _BATCH_TOKENS)
        self._batches: Batches[_Work] = Batches(executor, self._handle)

    @property
    def info(self) -> TokenEngineInfo:
        return self._info

    async def start(self) -> None:
        """The model is there already."""

    async def close(self) -> None:
        """Whoever holds the model frees it."""

    async def sample(self, prompt: Ids, n: int, params: SampleParams) -> list[SampledTokens]:
        tokens = self._checked(prompt)
        if n < 1 or params.max_tokens < 1:
            raise ValueError(f"n and max_tokens count from 1, not {n} and {params.max_tokens}")
        room = self._context - len(tokens)
        if room < 1:
            raise self._overflow(len(tokens), "leaves no room for a sample in")
        limit = min(params.max_tokens, room)
        rows = [
            decoding.Row(tokens, limit, uniforms(tokens, params.seed, number, limit))
            for number in range(n)
        ]
        shared = dataclasses.replace(params, max_tokens=0, seed=None)
        samples: list[SampledTokens] = await self._batches.submit(_Sample(tokens, rows, shared))
        return samples

    async def compute_logprobs(self, tokens: Ids, *, start: int = 1, topk: int = 0) -> TokenScores:
        checked = self._checked(tokens)
        if len(checked) > self._context:
            raise self._overflow(len(checked), "does not fit")
        scores: TokenScores = await self._batches.submit(_Score(checked, max(1, start), topk))
        return scores

    async def compute_distributions(self, tokens: Ids, positions: Sequence[int]) -> Any:
        checked = self._checked(tokens)
        if len(checked) > self._context:
            raise self._overflow(len(checked), "does not fit")
        at = np.asarray(positions, np.int64)
        if len(at) and not (at.min() >= 1 and at.max() < len(checked)):
            raise ValueError(f"positions of {len(checked)} tokens count from 1")
        return await self._batches.submit(_Distributions(checked, at))

    def _checked(self, tokens: Ids) -> tuple[int, ...]:
        ids = tuple(map(int, tokens))
        if not ids:
            raise RowError("there are no tokens", stage="generation", kind="empty")
        # An index past the embedding would bring a GPU down with all that is on it.
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            raise RowError(
                f"token {max(ids)} is none of the {self._vocabulary} that {self._info.name} knows",
                stage="generation",
                kind="vocabulary",
            )
        return ids

    def _overflow(self, count: int, what: str) -> RowError:
        return RowError(
            f"a sequence of {count} tokens {what} the context of {self._context} tokens",
            stage="generation",
            kind="context",
        )

    # What follows runs on the executor's thread.

    def _handle(self, calls: Sequence[Call[_Work]]) -> Sequence[Any]:
        outcomes: dict[int, Any] = {}
        kinds: dict[Any, list[int]] = {}
        with self._lease() as model:
            for number, call in enumerate(calls):
                kinds.setdefault(_kind(call.work, model), []).append(number)
            for numbers in kinds.values():
                group = [calls[number] for number in numbers]
                if isinstance(group[0].work, _Sample):
                    results = self._sample(model, group)
                else:
                    results = self._score(model, [call.work for call in group])
                outcomes.update(zip(numbers, results, strict=True))
        return [outcomes[number] for number in range(len(calls))]

    def _sample(self, model: CausalModel, calls: Sequence[Call[Any]]) -> list[Any]:
        owners = [number for number, call in enumerate(calls) for _ in call.work.rows]
        rows = [row for call in calls for row in call.work.rows]
        samples: list[SampledTokens] = []
        size = self._max_batch or _together(model, rows)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            waited = [calls[number].future for number in dict.fromkeys(owners[part])]

            def abandoned(futures: Sequence[asyncio.Future[Any]] = waited) -> bool:
                return all(future.cancelled() for future in futures)

            samples += self._decode(model, rows[part], calls[0].work.params, abandoned)
        taken: Iterator[SampledTokens] = iter(samples)
        return [[next(taken) for _ in call.work.rows] for call in calls]

    def _decode(
        self,
        model: CausalModel,
        rows: Sequence[decoding.Row],
        params: SampleParams,
        abandoned: Callable[[], bool],
    ) -> list[SampledTokens]:
        """In halves where the device's memory is too small."""
        try:
            return decoding.decode(model, rows, params, abandoned=abandoned)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        torch.cuda.empty_cache()
        middle = len(rows) // 2
        return [
            *self._decode(model, rows[:middle], params, abandoned),
            *self._decode(model, rows[middle:], params, abandoned),
        ]

    def _score(self, model: CausalModel, works: Sequence[Any]) -> list[Any]:
        outcomes: list[Any] = [None] * len(works)
        lengths = [len(work.tokens) for work in works]
        for numbers in scoring.micro_batches(lengths, self._batch_tokens):
            part = [works[number] for number in numbers]
            sequences = [work.tokens for work in part]
            if isinstance(part[0], _Score):
                starts, topk = [work.start for work in part], [work.topk for work in part]
                results: list[Any] = list(scoring.score(model, sequences, starts, topk))
            else:
                positions = [work.positions for work in part]
                results = scoring.distributions(model, sequences, positions)
            for number, result in zip(numbers, results, strict=True):
                outcomes[number] = result
        return outcomes


def _kind(work: _Work, model: CausalModel) -> Any:
    """Calls of one kind can share a batch."""
    if not isinstance(work, _Sample):
        return type(work)
    return work.params, None if model.takes_masks else len(work.prompt)
