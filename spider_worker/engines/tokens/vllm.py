"""vLLM on this worker: a teacher that scores, and a sampler for the student under training.

Each has a process of its own (``vllm_process.py``). How it shares a GPU's memory with the trainer
is in ``vllm_arguments.py``, and can be set with ``gpu_memory_utilization``.
"""

from __future__ import annotations

__all__ = ["VllmAdapterServer", "VllmTokenEngine"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spider_sdk.errors import NotSupported, PipelineError
from spider_worker.engines.tokens import requests
from spider_worker.engines.tokens.vllm_arguments import check_arguments
from spider_worker.engines.tokens.vllm_process import (
    Adapter,
    Facts,
    Sample,
    Score,
    Setup,
    VllmProcess,
)
from spider_worker.tokens import Ids, SampledTokens, SampleParams, TokenEngineInfo, TokenScores

_SEED_BITS = 63


class VllmTokenEngine:
    """TokenEngine over the model ``model`` (a folder or a Hub name), without an adapter.
    ``arguments`` are vLLM's EngineArgs by name, without ``model``; they stand at ``where`` in the
    job.

    A sequence may have a token less than vLLM's ``max_model_len``: it scores by a request that
    must have room for one token more. ``max_logprobs`` (20) bounds what it returns per position.
    """

    def __init__(
        self,
        model: str,
        *,
        arguments: Mapping[str, Any] | None = None,
        where: str = "teacher.parameters",
    ) -> None:
        arguments = dict(arguments or {})
        check_arguments(arguments, where=where)
        self._process = VllmProcess(Setup(model, arguments, where, None))
        self._info = TokenEngineInfo(model)
        self._vocabulary: int | None = None

    @property
    def info(self) -> TokenEngineInfo:
        """Before ``start``, without the context and ``topk``."""
        return self._info

    async def start(self) -> None:
        facts = await self._process.start()
        self._vocabulary = facts.vocabulary
        self._info = TokenEngineInfo(self._info.name, facts.topk, facts.context - 1)

    async def sample(self, prompt: Ids, n: int, params: SampleParams) -> list[SampledTokens]:
        return await _sample(self._process, prompt, n, params, self._vocabulary, self._info.context)

    async def compute_logprobs(self, tokens: Ids, *, start: int = 1, topk: int = 0) -> TokenScores:
        context = self._info.context
        ids = requests.checked(tokens, vocabulary=self._vocabulary, context=context)
        if topk > self._info.topk:
            raise NotSupported(
                f"{self._info.name}: {topk} tokens per position are more than max_logprobs,"
                f" {self._info.topk}. Raise teacher.parameters.max_logprobs."
            )
        scores: TokenScores = await self._process.ask(Score(ids, start, topk))
        return scores

    async def close(self) -> None:
        await self._process.close()


class VllmAdapterServer:
    """AdapterServer over the base model ``model``. ``arguments`` as for VllmTokenEngine."""

    name = "vllm"

    def __init__(
        self,
        model: str,
        *,
        lora_rank: int,
        arguments: Mapping[str, Any] | None = None,
        where: str = "model.parameters.vllm",
    ) -> None:
        arguments = dict(arguments or {})
        check_arguments(arguments, where=where)
        self._process = VllmProcess(Setup(model, arguments, where, lora_rank))
        self._name = model
        self._facts: Facts | None = None
        self._version = 0

    async def start(self) -> None:
        self._facts = await self._process.start()

    async def serve(self, adapter: Path) -> _AdapterEngine:
        """See AdapterServer. Raises FatalJobError for an adapter that vLLM cannot serve."""
        if self._facts is None:
            raise PipelineError("The vllm engine was used before start or after close.")
        self._version += 1
        await self._process.ask(Adapter(str(adapter), self._version))
        info = TokenEngineInfo(self._name, 0, self._facts.context)
        return _AdapterEngine(self._process, self._version, info, self._facts.vocabulary)

    async def close(self) -> None:
        await self._process.close()


class _AdapterEngine:
    """Samples under the adapter of one version; the process refuses one that is not the last."""

    def __init__(
        self, process: VllmProcess, version: int, info: TokenEngineInfo, vocabulary: int
    ) -> None:
        self._process, self._version = process, version
        self._info, self._vocabulary = info, vocabulary

    @property
    def info(self) -> TokenEngineInfo:
        return self._info

    async def start(self) -> None:
        """The server has started already."""

    async def close(self) -> None:
        """Whoever holds the server closes it."""

    async def sample(self, prompt: Ids, n: int, params: SampleParams) -> list[SampledTokens]:
        return await _sample(
            self._process, prompt, n, params, self._vocabulary, self._info.context, self._version
        )

    async def compute_logprobs(
        self,
        tokens: Ids,  # noqa: ARG002
        *,
        start: int = 1,  # noqa: ARG002
        topk: int = 0,  # noqa: ARG002
    ) -> TokenScores:
        """Raises NotSupported: vLLM leaves the adapter of the output layer out of the scores of
        given tokens, or fails over it. A trainer's ``forward`` scores under its own weights."""
        raise NotSupported(
            "vLLM does not score given tokens under an adapter. Use the trainer's forward."
        )


async def _sample(
    process: VllmProcess,
    prompt: Ids,
    n: int,
    params: SampleParams,
    vocabulary: int | None,
    context: int | None,
    version: int | None = None,
) -> list[SampledTokens]:
    ids = requests.checked(prompt, vocabulary=vocabulary, context=None)
    limit = requests.limit(ids, n, params, context=context)
    # Requests of their own rather than vLLM's n, which would count seeds up by one.
    seeds = requests.sample_seeds(ids, params.seed, n, bits=_SEED_BITS)
    samples: list[SampledTokens] = await process.ask(Sample(ids, seeds, limit, params, version))
    return samples
