"""The engine over a real server, in what the contract of token engines says.

``tests/contract/token_engines`` has the same for engines that know their model's vocabulary and
context, which this server does not tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from spider_sdk.errors import EngineUnavailable, PipelineError, RowError
from spider_worker.engines.tokens.selftest import check_scorer
from spider_worker.engines.tokens.text import load_text
from spider_worker.engines.tokens.tinker import TinkerTokenEngine
from spider_worker.tokens import SampledTokens, SampleParams
from tests.contract.tinker.conftest import Run
from tests.support.reference import check_sample, greedy, load_reference, logprob_table
from tests.support.tinker_server import TinkerServer

TOKENS = (5, 9, 30, 41, 8, 17, 44, 44, 200)
COUNT = 6  # tokens of a sample: the server compiles for each count anew
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def engine(tinker_server: TinkerServer, run: Run[Any]) -> Iterator[TinkerTokenEngine]:
    engine = TinkerTokenEngine(tinker_server.name, base_url=tinker_server.url)
    run(engine.start())
    yield engine
    run(engine.close())


@pytest.fixture(scope="module")
def reference(tinker_server: TinkerServer) -> Any:
    return load_reference(tinker_server.model)


def tokens_of(samples: list[SampledTokens]) -> list[tuple[int, ...]]:
    return [sample.tokens for sample in samples]


def test_each_score_is_of_its_own_token(
    engine: TinkerTokenEngine, reference: Any, run: Run[Any]
) -> None:
    scores = run(engine.compute_logprobs(TOKENS))
    table = logprob_table(reference, TOKENS)
    wanted = [table[at, TOKENS[at]].item() for at in range(1, len(TOKENS))]
    assert scores.logprobs.dtype == np.float32
    assert np.isnan(scores.logprobs[0])
    np.testing.assert_allclose(scores.logprobs[1:], wanted, atol=TOLERANCE)
    assert scores.topk is None


def test_a_single_token_has_no_score(engine: TinkerTokenEngine, run: Run[Any]) -> None:
    scores = run(engine.compute_logprobs((5,)))
    assert scores.logprobs.shape == (1,)
    assert np.isnan(scores.logprobs).all()


def test_a_server_without_the_best_tokens_says_so(engine: TinkerTokenEngine, run: Run[Any]) -> None:
    assert engine.info.topk == 0
    with pytest.raises(EngineUnavailable, match="most probable tokens"):
        run(engine.compute_logprobs(TOKENS, topk=2))


def test_it_passes_its_self_test(
    engine: TinkerTokenEngine, tinker_server: TinkerServer, run: Run[Any]
) -> None:
    run(check_scorer(engine, load_text(str(tinker_server.model)), "served"))


def test_greedy_samples_are_what_the_model_finds_most_likely(
    engine: TinkerTokenEngine, reference: Any, run: Run[Any]
) -> None:
    for sample in run(engine.sample(TOKENS, 2, SampleParams(COUNT, temperature=0.0))):
        assert list(sample.tokens) == greedy(reference, TOKENS, COUNT)
        assert sample.stop_reason == "length"
        check_sample(reference, TOKENS, sample, TOLERANCE)


def test_samples_carry_the_logprobs_they_were_drawn_with(
    engine: TinkerTokenEngine, reference: Any, run: Run[Any]
) -> None:
    prompts = [TOKENS[:2], TOKENS]

    async def together() -> Any:
        params = SampleParams(COUNT, seed=1)
        return await asyncio.gather(*(engine.sample(prompt, 3, params) for prompt in prompts))

    for prompt, samples in zip(prompts, run(together()), strict=True):
        assert len(set(tokens_of(samples))) == 3
        for sample in samples:
            check_sample(reference, prompt, sample, TOLERANCE)


def test_a_seed_decides_whatever_the_company(engine: TinkerTokenEngine, run: Run[Any]) -> None:
    params = SampleParams(COUNT, seed=4)
    alone = tokens_of(run(engine.sample(TOKENS, 2, params)))

    async def in_company() -> Any:
        other = engine.sample(TOKENS[:4], 3, SampleParams(COUNT, seed=9))
        return (await asyncio.gather(other, engine.sample(TOKENS, 2, params)))[1]

    assert tokens_of(run(in_company())) == alone
    next_seed = tokens_of(run(engine.sample(TOKENS, 2, SampleParams(COUNT, seed=5))))
    free = [tokens_of(run(engine.sample(TOKENS, 2, SampleParams(COUNT)))) for _ in range(2)]
    assert len({*alone, *next_seed, *free[0], *free[1]}) == 8


def test_a_stop_token_ends_a_sample_and_stays(engine: TinkerTokenEngine, run: Run[Any]) -> None:
    whole = run(engine.sample(TOKENS, 2, SampleParams(COUNT, seed=2)))
    stops = (whole[0].tokens[1], whole[1].tokens[3])
    cut = run(engine.sample(TOKENS, 2, SampleParams(COUNT, stops, seed=2)))
    for one, other in zip(whole, cut, strict=True):
        end = next(at + 1 for at, token in enumerate(one.tokens) if token in stops)
        assert other.tokens == one.tokens[:end]
        assert other.stop_reason == "stop"
        np.testing.assert_allclose(other.logprobs, one.logprobs[:end], atol=TOLERANCE)


def test_tokens_that_are_none_are_a_rows_error(engine: TinkerTokenEngine, run: Run[Any]) -> None:
    for tokens in ((), (-1, 5)):
        with pytest.raises(RowError):
            run(engine.sample(tokens, 1, SampleParams(1)))
        with pytest.raises(RowError):
            run(engine.compute_logprobs(tokens))


def test_before_it_starts_it_says_so(tinker_server: TinkerServer, run: Run[Any]) -> None:
    engine = TinkerTokenEngine(tinker_server.name, base_url=tinker_server.url)
    with pytest.raises(PipelineError, match="before start"):
        run(engine.sample(TOKENS, 1, SampleParams(1)))
    run(engine.close())
