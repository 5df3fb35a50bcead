"""Where a service's log-probabilities belong, however many it returns."""

from __future__ import annotations

import asyncio
import types
from typing import Any

import numpy as np
import pytest

from spider_sdk.errors import Diverged, EngineUnavailable, RowError
from spider_worker.tinker_service.errors import Refusal
from spider_worker.tinker_service.sampling import ServiceSampler
from spider_worker.tokens import SampleParams, TokenEngineInfo

TOKENS = (5, 9, 30, 41)


class Service:
    """What a TinkerService is to a sampler. Each call gets ``answer``, or it is raised."""

    name = "the service"

    def __init__(self, **answer: Any) -> None:
        self.answer: Any = types.SimpleNamespace(**answer)
        self.asked: list[Any] = []
        self.sdk = types.SimpleNamespace(
            types=types.SimpleNamespace(
                SamplingParams=lambda **options: types.SimpleNamespace(**options),
                ModelInput=types.SimpleNamespace(from_ints=tuple),
            )
        )

    async def call(self, what: str, owner: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        self.asked.append((*args, kwargs))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def sampler(service: Service, context: int | None = None) -> ServiceSampler:
    info = TokenEngineInfo("m", topk=20, context=context)
    return ServiceSampler(service, None, info)  # type: ignore[arg-type]


def sequence(*tokens: int, reason: str = "length", logprobs: Any = None) -> Any:
    given = [-float(token) for token in tokens] if logprobs is None else logprobs
    return types.SimpleNamespace(tokens=list(tokens), logprobs=given, stop_reason=reason)


@pytest.mark.parametrize(
    "returned",
    [
        [None, -9.0, -30.0, -41.0],  # one for each token
        [-0.5, -9.0, -30.0, -41.0],  # with something for the first, which means nothing
        [-9.0, -30.0, -41.0],  # one for each token but the first
    ],
)
def test_every_value_lands_on_its_own_token(returned: list[float | None]) -> None:
    engine = sampler(Service(prompt_logprobs=returned))
    scores = asyncio.run(engine.compute_logprobs(TOKENS))
    np.testing.assert_array_equal(scores.logprobs, np.float32([np.nan, -9, -30, -41]))


@pytest.mark.parametrize("returned", [[-1.0], [-1.0] * 5])
def test_another_number_of_values_is_an_error(returned: list[float]) -> None:
    with pytest.raises(EngineUnavailable, match="for 4 tokens"):
        asyncio.run(sampler(Service(prompt_logprobs=returned)).compute_logprobs(TOKENS))


@pytest.mark.parametrize("first", [[None], []])
def test_rows_of_the_best_are_put_in_order_and_cut(first: list[None]) -> None:
    rows = [*first, [(1, -3.0), (2, -1.0), (3, -2.0)], [(4, -0.5)], None]
    service = Service(prompt_logprobs=[-1.0] * 3, topk_prompt_logprobs=rows)
    best = asyncio.run(sampler(service).compute_logprobs(TOKENS, topk=2)).topk
    assert best is not None
    np.testing.assert_array_equal(best.ids, [[-1, -1], [2, 3], [4, -1], [-1, -1]])
    none = -np.inf
    np.testing.assert_array_equal(
        best.logprobs, np.float32([[none, none], [-1, -2], [-0.5, none], [none, none]])
    )


def test_a_sample_for_each_seed_and_one_request_without() -> None:
    service = Service(sequences=[sequence(7, 8)])
    asyncio.run(sampler(service).sample(TOKENS, 3, SampleParams(2, seed=1)))
    seeds = [options.seed for _, _, options, _ in service.asked]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**31 for seed in seeds)
    service = Service(sequences=[sequence(7), sequence(8)])
    asyncio.run(sampler(service).sample(TOKENS, 2, SampleParams(2, (3,), top_k=5)))
    ((prompt, count, options, _),) = service.asked
    assert (prompt, count, options.seed) == (TOKENS, 2, None)
    assert (options.stop, options.top_k) == ([3], 5)


def test_without_stops_nothing_ends_a_sample() -> None:
    service = Service(sequences=[sequence(7)])
    asyncio.run(sampler(service).sample(TOKENS, 1, SampleParams(1)))
    ((_, _, options, _),) = service.asked
    assert (options.stop, options.top_k) == ([], -1)


def test_the_context_bounds_a_sample() -> None:
    service = Service(sequences=[sequence(7)])
    asyncio.run(sampler(service, context=6).sample(TOKENS, 1, SampleParams(10)))
    ((_, _, options, _),) = service.asked
    assert options.max_tokens == 2
    with pytest.raises(RowError, match="context of 4 tokens"):
        asyncio.run(sampler(service, context=4).sample(TOKENS, 1, SampleParams(10)))
    with pytest.raises(RowError, match="context of 3 tokens"):
        asyncio.run(sampler(service, context=3).compute_logprobs(TOKENS))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (sequence(7, 8, reason="stop"), "was not asked to stop at"),
        (sequence(7, logprobs=[]), "no log-probability"),
    ],
)
def test_a_sample_that_teaches_nothing_is_an_error(answer: Any, said: str) -> None:
    service = Service(sequences=[answer])
    with pytest.raises(EngineUnavailable, match=said):
        asyncio.run(sampler(service).sample(TOKENS, 1, SampleParams(2, stop=(3,))))


def test_weights_that_give_no_numbers_are_said_to_be_ruined() -> None:
    service = Service(sequences=[sequence(7, 8, logprobs=[-1.0, float("nan")])])
    with pytest.raises(Diverged, match="no numbers"):
        asyncio.run(sampler(service).sample(TOKENS, 1, SampleParams(2)))


def test_a_prompt_that_the_service_finds_too_long_is_a_rows_error() -> None:
    service = Service()
    service.answer = Refusal("no", status=400, detail="exceeds the context window")
    with pytest.raises(RowError) as caught:
        asyncio.run(sampler(service).sample(TOKENS, 1, SampleParams(2)))
    assert caught.value.kind == "context"
    service.answer = Refusal("no", status=404, detail="no such context")
    with pytest.raises(Refusal):
        asyncio.run(sampler(service).sample(TOKENS, 1, SampleParams(2)))
