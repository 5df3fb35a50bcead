"""A model that Tinker, or a server that speaks its protocol, samples from: a teacher."""

from __future__ import annotations

__all__ = ["TinkerTokenEngine"]

from typing import Final

from spider_sdk.errors import PipelineError
from spider_worker.tinker_service.errors import Refusal
from spider_worker.tinker_service.sampling import ServiceSampler
from spider_worker.tinker_service.service import TinkerService
from spider_worker.tokens import Ids, SampledTokens, SampleParams, TokenEngineInfo, TokenScores

#: Entries a position that the service is asked for at the start, to see whether it has any.
_TOP_K: Final = 20
_PATH: Final = "tinker://"


class TinkerTokenEngine:
    """TokenEngine over the model ``name``, a base model of the service or a ``tinker://`` path to
    sampler weights. ``patience`` is how many seconds the service may be silent."""

    def __init__(
        self,
        name: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        allow_private: bool = True,
        patience: float = 120.0,
    ) -> None:
        self._name = name
        self._service = TinkerService(
            base_url=base_url,
            api_key=api_key,
            where="teacher",
            allow_private=allow_private,
            patience=patience,
        )
        self._sampler: ServiceSampler | None = None

    @property
    def info(self) -> TokenEngineInfo:
        """Before ``start``, without the context and ``topk``."""
        return self._sampler.info if self._sampler is not None else TokenEngineInfo(self._name)

    async def start(self) -> None:
        service = self._service
        await service.start()
        if self._name.startswith(_PATH):
            model, context = {"model_path": self._name}, None
        else:
            model, context = {"base_model": self._name}, service.context_of(self._name)
        client = await service.call(
            "opening a sampler", service.client, "create_sampling_client", **model
        )
        topk = await self._probe(client)
        info = TokenEngineInfo(self._name, topk=topk, context=context)
        self._sampler = ServiceSampler(service, client, info)

    async def sample(self, prompt: Ids, n: int, params: SampleParams) -> list[SampledTokens]:
        return await self._started().sample(prompt, n, params)

    async def compute_logprobs(self, tokens: Ids, *, start: int = 1, topk: int = 0) -> TokenScores:
        return await self._started().compute_logprobs(tokens, start=start, topk=topk)

    async def close(self) -> None:
        self._sampler = None
        await self._service.close()

    async def _probe(self, client: object) -> int:
        """How many of the most probable tokens the service returns: servers that have none leave
        them out and say nothing. Two tokens that every vocabulary has are scored for it, which
        also shows a model that cannot be sampled."""
        types = self._service.sdk.types
        try:
            answer = await self._service.call(
                "scoring two tokens",
                client,
                "sample",
                types.ModelInput.from_ints([0, 1]),
                1,
                types.SamplingParams(max_tokens=1),
                include_prompt_logprobs=True,
                topk_prompt_logprobs=_TOP_K,
            )
        except Refusal as error:
            if "topk" in error.detail:
                return 0
            raise
        rows = answer.topk_prompt_logprobs
        return min(_TOP_K, len(rows[-1] or ())) if rows else 0

    def _started(self) -> ServiceSampler:
        if self._sampler is None:
            raise PipelineError("The Tinker engine was used before start or after close.")
        return self._sampler
