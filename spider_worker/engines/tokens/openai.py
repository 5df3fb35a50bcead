"""A teacher behind an HTTP server that takes token ids: vLLM's, or one that is compatible with
OpenAI's ``/completions``."""

from __future__ import annotations

__all__ = ["ENGINE_PARAMETERS", "OpenAITokenEngine", "check_parameters"]

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import orjson

from spider_sdk.errors import (
    EngineUnavailable,
    NotSupported,
    PipelineError,
    RowError,
)
from spider_worker.engines import endpoint
from spider_worker.engines.endpoint import Endpoint, EndpointOptions
from spider_worker.engines.options import check_names, refuse
from spider_worker.engines.tokens import requests
from spider_worker.engines.tokens.completions import (
    Dialect,
    EchoDialect,
    PromptLogprobsDialect,
    no_scores,
    read_context,
    read_samples,
)
from spider_worker.engines.wire import EndpointError
from spider_worker.tokens import Ids, SampledTokens, SampleParams, TokenEngineInfo, TokenScores

T = TypeVar("T")

ENGINE_PARAMETERS: Final = {
    **endpoint.PARAMETERS,
    "context": "tokens of a sequence (what the server says in /models, where it does)",
    "max_in_flight": "requests at once (256)",
    "topk": "most probable tokens per position that the server returns (20, as vLLM's does)",
}
"""What ``parameters`` may hold, and what each means."""

_PATH: Final = "/completions"
_OURS: Final = frozenset(
    {
        "best_of", "echo", "logprobs", "max_tokens", "model", "n", "prompt", "prompt_logprobs",
        "seed", "stop", "stop_token_ids", "stream", "suffix", "temperature", "top_k", "top_p",
    }
)  # fmt: skip
#: Tokens that any model has.
_PROBE: Final = (0, 1, 2)
#: Seeds are sent as numbers of so many bits, which every server takes.
_SEED_BITS: Final = 31


def check_parameters(parameters: Mapping[str, Any], *, where: str = "teacher.parameters") -> None:
    """Raises NotSupported for a parameter that is unknown or malformed."""
    check_names(parameters, ENGINE_PARAMETERS, where=where, engine="openai")
    endpoint.check_parameters(parameters, where=where)
    for name in ("context", "max_in_flight", "topk"):
        value = parameters.get(name, 1)
        least = 0 if name == "topk" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            refuse(f"{where}.{name}: expected a whole number from {least}, not {value!r}")
    for name in parameters.get("extra_body", {}):
        if name in _OURS:
            refuse(f"{where}.extra_body.{name} cannot be set: the engine asks for what it needs")


class OpenAITokenEngine:
    """TokenEngine over the model ``model`` that the server at ``base_url`` serves. ``parameters``
    are ``teacher.parameters``; ``allow_private`` lets connections go to private addresses.

    ``start`` finds out how the server can be asked for scores. A sequence may have a token less
    than its ``max_model_len``: scoring generates a token, too.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        api_key: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        allow_private: bool = True,
        where: str = "teacher",
    ) -> None:
        parameters = parameters or {}
        check_parameters(parameters, where=f"{where}.parameters")
        self._where = where
        self._endpoint = Endpoint(
            base_url.rstrip("/").removesuffix(_PATH).removesuffix("/chat"),
            model=model,
            api_key=api_key,
            parameters=parameters,
            options=EndpointOptions(
                where=where,
                lasting=_lasting,
                max_in_flight=parameters.get("max_in_flight", 256),
                allow_private=allow_private,
            ),
        )
        self._fixed = {**parameters.get("extra_body", {}), "model": model}
        self._topk = parameters.get("topk", 20)
        self._info = TokenEngineInfo(model, context=parameters.get("context"))
        self._dialect: Dialect | None = None

    @property
    def info(self) -> TokenEngineInfo:
        """``topk`` and the context are known once the engine has started."""
        return self._info

    async def start(self) -> None:
        """Raises NotSupported too: where the server does not score given tokens."""
        await self._endpoint.open()
        self._dialect = dialect = await self._find_dialect()
        context = self._info.context
        if context is None:
            context = await self._ask_context()
        self._info = dataclasses.replace(
            self._info, topk=self._topk if dialect.topk else 0, context=context
        )

    async def sample(self, prompt: Ids, n: int, params: SampleParams) -> list[SampledTokens]:
        """Raises NotSupported for what would be sampled from another distribution than the one
        that servers give log-probabilities of, the model's own, and for a server that does not
        name the tokens that it sampled."""
        if params.temperature not in (0.0, 1.0) or params.top_p != 1.0 or params.top_k > 0:
            raise NotSupported(
                f"{self._info.name} can be sampled at temperature 1 or 0, without top_p and top_k:"
                " log-probabilities come for no other distribution"
            )
        dialect = self._started()
        ids = requests.checked(prompt, vocabulary=None, context=None)
        limit = requests.limit(ids, n, params, context=self._info.context)
        if params.temperature == 0:
            # Servers refuse several greedy samples, which are one.
            (sample,) = await self._sample(dialect.sample(ids, 1, limit, params), 1, limit, params)
            return [sample] * n
        if params.seed is None:
            return await self._sample(dialect.sample(ids, n, limit, params), n, limit, params)
        body = dialect.sample(ids, 1, limit, params)
        seeds = requests.sample_seeds(ids, params.seed, n, bits=_SEED_BITS)
        found = await asyncio.gather(
            *(self._sample({**body, "seed": seed}, 1, limit, params) for seed in seeds)
        )
        return [sample for (sample,) in found]

    async def compute_logprobs(self, tokens: Ids, *, start: int = 1, topk: int = 0) -> TokenScores:
        dialect = self._started()
        ids = requests.checked(tokens, vocabulary=None, context=self._info.context)
        if topk > self._info.topk:
            raise NotSupported(
                f"{self._info.name}: {topk} tokens per position are more than the server returns,"
                f" {self._info.topk}. Raise {self._where}.parameters.topk (and vLLM's"
                " --max-logprobs)."
            )
        if start >= len(ids):
            return no_scores(len(ids), topk)
        scores = await self._score(dialect, ids, max(1, start), topk)
        if scores is None:
            raise EngineUnavailable(f"{self._endpoint.base_url} gave no scores this time")
        return scores

    async def close(self) -> None:
        self._dialect = None
        await self._endpoint.close()

    def _started(self) -> Dialect:
        if self._dialect is None:
            raise PipelineError("The openai engine was used before start or after close.")
        return self._dialect

    async def _find_dialect(self) -> Dialect:
        said = "it answers without them"
        for dialect in (PromptLogprobsDialect(), EchoDialect(), EchoDialect(generated=1)):
            try:
                if await self._score(dialect, _PROBE, 1, 0) is not None:
                    return dialect
            except RowError as error:  # it does not take what it does not know
                said = error.message
        raise NotSupported(
            f"{self._where} {self._info.name}: {self._endpoint.base_url} gives no log-probabilities"
            f" of given tokens ({said}). Use a server that has prompt_logprobs, such as vLLM's, or"
            " one whose echo has logprobs."
        )

    async def _ask_context(self) -> int | None:
        def read(answer: bytes) -> int | None:
            return read_context(answer, self._info.name)

        try:
            length = await self._endpoint.request("/models", None, _shaped(read))
        except RowError:
            return None  # it has no such route: the server's own limit will be met
        return None if length is None else length - 1

    async def _score(
        self, dialect: Dialect, ids: tuple[int, ...], start: int, topk: int
    ) -> TokenScores | None:
        read = functools.partial(dialect.read_scores, tokens=ids, start=start, topk=topk)
        body = orjson.dumps({**self._fixed, **dialect.score(ids, topk)})
        return await self._endpoint.request(_PATH, body, _shaped(read))

    async def _sample(
        self, body: Mapping[str, Any], n: int, limit: int, params: SampleParams
    ) -> list[SampledTokens]:
        read = functools.partial(read_samples, n=n, limit=limit, params=params)
        data = orjson.dumps({**self._fixed, **body})
        samples = await self._endpoint.request(_PATH, data, _shaped(read))
        if samples is None:
            raise NotSupported(
                f"{self._endpoint.base_url} does not name the tokens that it samples by their ids"
            )
        return samples


def _shaped(read: Callable[[bytes], T]) -> Callable[[bytes], T]:
    """``read``, for answers that may be anything."""

    def shaped(answer: bytes) -> T:
        try:
            return read(answer)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EndpointError(f"an answer of unknown shape: {answer[:200]!r}") from error

    return shaped


def _lasting(_: str, message: str) -> PipelineError:
    return EngineUnavailable(message)
