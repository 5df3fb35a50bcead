"""What every token engine does, whoever runs its model."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spider_sdk.errors import PipelineError, RowError
from spider_worker.engines.tokens.selftest import check_scorer
from spider_worker.engines.tokens.text import load_text
from spider_worker.tokens import SampledTokens, SampleParams
from tests.contract.token_engines.conftest import CONTEXT, Kind, Run
from tests.support.reference import check_sample, greedy, logprob_table

TOKENS = (5, 9, 30, 41, 8, 17, 44, 44, 200)
GREEDY = SampleParams(12, temperature=0.0)


def test_info_says_what_it_can_do(kind: Kind) -> None:
    info = kind.engine.info
    assert info.name
    assert info.context == CONTEXT


def test_a_scorer_says_how_many_it_returns_per_position(scorer: Kind) -> None:
    assert scorer.engine.info.topk >= 20


def test_each_score_is_of_its_own_token(scorer: Kind, run: Run[Any]) -> None:
    scores = run(scorer.engine.compute_logprobs(TOKENS))
    want = logprob_table(scorer.reference, TOKENS)
    assert scores.logprobs.dtype == np.float32
    assert scores.logprobs.shape == (len(TOKENS),)
    assert np.isnan(scores.logprobs[0])
    for at in range(1, len(TOKENS)):
        wanted = want[at, TOKENS[at]].item()
        assert scores.logprobs[at] == pytest.approx(wanted, abs=scorer.tolerance)
    assert scores.topk is None


def test_topk_are_the_best_of_each_position_in_order(scorer: Kind, run: Run[Any]) -> None:
    scores = run(scorer.engine.compute_logprobs(TOKENS, topk=5))
    assert scores.topk is not None
    assert scores.topk.ids.dtype == np.int64
    assert scores.topk.logprobs.dtype == np.float32
    values, ids = logprob_table(scorer.reference, TOKENS)[1:].topk(5)
    np.testing.assert_array_equal(scores.topk.ids[1:], ids)
    np.testing.assert_allclose(scores.topk.logprobs[1:], values, atol=scorer.tolerance)
    assert (scores.topk.ids[0] == -1).all()
    assert np.isneginf(scores.topk.logprobs[0]).all()
    alone = run(scorer.engine.compute_logprobs(TOKENS)).logprobs
    np.testing.assert_allclose(scores.logprobs, alone, atol=scorer.tolerance)


def test_a_token_that_is_the_best_is_among_them_once(scorer: Kind, run: Run[Any]) -> None:
    best = greedy(scorer.reference, TOKENS, 4)
    tokens = (*TOKENS, *best)
    scores = run(scorer.engine.compute_logprobs(tokens, start=len(TOKENS), topk=3))
    assert scores.topk is not None
    assert scores.topk.ids[len(TOKENS) :, 0].tolist() == best
    for row in scores.topk.ids[len(TOKENS) :]:
        assert len(set(row.tolist())) == 3
    np.testing.assert_allclose(
        scores.topk.logprobs[len(TOKENS) :, 0],
        scores.logprobs[len(TOKENS) :],
        atol=scorer.tolerance,
    )


def test_from_a_start_on_scores_are_the_same(scorer: Kind, run: Run[Any]) -> None:
    whole = run(scorer.engine.compute_logprobs(TOKENS, topk=2))
    for start in (0, 1, 6, len(TOKENS) - 1, len(TOKENS)):
        part = run(scorer.engine.compute_logprobs(TOKENS, start=start, topk=2))
        assert part.logprobs.shape == whole.logprobs.shape
        assert part.topk.ids.shape == whole.topk.ids.shape
        np.testing.assert_allclose(
            part.logprobs[start:], whole.logprobs[start:], atol=scorer.tolerance
        )
        np.testing.assert_array_equal(part.topk.ids[start:], whole.topk.ids[start:])


def test_a_single_token_has_no_score(scorer: Kind, run: Run[Any]) -> None:
    scores = run(scorer.engine.compute_logprobs((5,), topk=2))
    assert scores.logprobs.shape == (1,)
    assert np.isnan(scores.logprobs).all()
    assert (scores.topk.ids == -1).all()


def test_scores_asked_for_together_are_each_their_own(scorer: Kind, run: Run[Any]) -> None:
    calls = [TOKENS[start : start + length] for start in (0, 2) for length in (2, 5, 7)]
    topk = [0, 3, 0, 1, 2, 0]

    async def together() -> Any:
        return await asyncio.gather(
            *(scorer.engine.compute_logprobs(t, topk=k) for t, k in zip(calls, topk, strict=True))
        )

    for tokens, k, scores in zip(calls, topk, run(together()), strict=True):
        want = logprob_table(scorer.reference, tokens)
        wanted = [want[at, tokens[at]].item() for at in range(1, len(tokens))]
        np.testing.assert_allclose(scores.logprobs[1:], wanted, atol=scorer.tolerance)
        assert (scores.topk is None) == (k == 0)


def test_a_scorer_passes_its_self_test(scorer: Kind, run: Run[Any], tiny_model: Path) -> None:
    run(check_scorer(scorer.engine, load_text(str(tiny_model)), "tiny"))


def test_greedy_samples_are_what_the_model_finds_most_likely(kind: Kind, run: Run[Any]) -> None:
    for sample in run(kind.engine.sample(TOKENS, 2, GREEDY)):
        assert list(sample.tokens) == greedy(kind.reference, TOKENS, 12)
        assert sample.stop_reason == "length"
        check_sample(kind.reference, TOKENS, sample, kind.tolerance)


def test_samples_carry_the_logprobs_they_were_drawn_with(kind: Kind, run: Run[Any]) -> None:
    prompts = [TOKENS[:2], TOKENS, TOKENS[:5]]

    async def together() -> Any:
        params = SampleParams(12, seed=1)
        return await asyncio.gather(*(kind.engine.sample(p, 3, params) for p in prompts))

    for prompt, samples in zip(prompts, run(together()), strict=True):
        assert len({s.tokens for s in samples}) == 3
        for sample in samples:
            assert len(sample.tokens) == 12
            assert sample.stop_reason == "length"
            check_sample(kind.reference, prompt, sample, kind.tolerance)


def test_a_seed_decides_whatever_the_company(kind: Kind, run: Run[Any]) -> None:
    params = SampleParams(10, seed=4)
    alone = tokens_of(run(kind.engine.sample(TOKENS, 2, params)))

    async def in_company() -> Any:
        others = [kind.engine.sample(TOKENS[:4], 3, SampleParams(5, seed=9)) for _ in range(2)]
        return (await asyncio.gather(*others, kind.engine.sample(TOKENS, 2, params)))[-1]

    assert tokens_of(run(in_company())) == alone
    # Neither does a sample's number count the seed up, nor do other prompts draw alike.
    next_seed = tokens_of(run(kind.engine.sample(TOKENS, 2, SampleParams(10, seed=5))))
    free = [tokens_of(run(kind.engine.sample(TOKENS, 2, SampleParams(10)))) for _ in range(2)]
    assert len({*alone, *next_seed, *free[0], *free[1]}) == 8


def test_a_stop_token_ends_a_sample_and_stays(kind: Kind, run: Run[Any]) -> None:
    whole = run(kind.engine.sample(TOKENS, 4, SampleParams(20, seed=2)))
    stops = {s.tokens[at] for at, s in zip((2, 5, 9), whole, strict=False)}
    cut = run(kind.engine.sample(TOKENS, 4, SampleParams(20, tuple(stops), seed=2)))
    lengths = set()
    for one, other in zip(whole, cut, strict=True):
        end = next((i + 1 for i, token in enumerate(one.tokens) if token in stops), 20)
        lengths.add(end)
        assert other.tokens == one.tokens[:end]
        assert other.stop_reason == ("stop" if one.tokens[end - 1] in stops else "length")
        np.testing.assert_allclose(other.logprobs, one.logprobs[:end], atol=kind.tolerance)
    assert len(lengths) > 1


def test_only_what_is_asked_for_stops(kind: Kind, run: Run[Any], tiny_model: Path) -> None:
    """The model's own end of sequence is a token like any other, unless it is among the stops."""
    (end,) = load_text(str(tiny_model)).stops
    prompt = that_ends(kind.reference, end)
    (sample,) = run(kind.engine.sample(prompt, 1, SampleParams(3, temperature=0.0)))
    assert sample.tokens[0] == end
    assert len(sample.tokens) == 3
    (sample,) = run(kind.engine.sample(prompt, 1, SampleParams(3, (end,), temperature=0.0)))
    assert sample.tokens == (end,)
    assert sample.stop_reason == "stop"


def test_a_sample_ends_where_the_context_does(kind: Kind, run: Run[Any]) -> None:
    prompt = (7,) * (CONTEXT - 4)
    (sample,) = run(kind.engine.sample(prompt, 1, SampleParams(10, seed=1)))
    assert len(sample.tokens) == 4
    assert sample.stop_reason == "length"
    check_sample(kind.reference, prompt, sample, kind.tolerance)


def test_a_prompt_that_fills_the_context_is_a_rows_error(kind: Kind, run: Run[Any]) -> None:
    with pytest.raises(RowError, match=f"{CONTEXT} tokens") as caught:
        run(kind.engine.sample((7,) * CONTEXT, 1, SampleParams(1)))
    assert caught.value.kind == "context"


def test_the_context_can_be_scored_and_no_more(scorer: Kind, run: Run[Any]) -> None:
    whole = run(scorer.engine.compute_logprobs((7,) * CONTEXT))
    assert np.isfinite(whole.logprobs[1:]).all()
    with pytest.raises(RowError, match=f"context of {CONTEXT} tokens") as caught:
        run(scorer.engine.compute_logprobs((7,) * (CONTEXT + 1)))
    assert caught.value.kind == "context"


def test_tokens_that_are_none_are_a_rows_error(kind: Kind, run: Run[Any]) -> None:
    for tokens in ((), (5, 512), (-1, 5)):
        with pytest.raises(RowError):
            run(kind.engine.sample(tokens, 1, SampleParams(1)))
    assert len(run(kind.engine.sample(TOKENS, 1, SampleParams(2)))) == 1


def test_tokens_that_are_none_are_not_scored(scorer: Kind, run: Run[Any]) -> None:
    for tokens in ((), (5, 512), (-1, 5)):
        with pytest.raises(RowError):
            run(scorer.engine.compute_logprobs(tokens))
    assert len(run(scorer.engine.compute_logprobs(TOKENS)).logprobs) == len(TOKENS)


def test_a_call_that_is_given_up_does_not_hold_the_others(kind: Kind, run: Run[Any]) -> None:
    async def story() -> Any:
        lost = asyncio.ensure_future(kind.engine.sample(TOKENS, 6, SampleParams(80)))
        kept = asyncio.ensure_future(kind.engine.sample(TOKENS, 1, SampleParams(2)))
        await asyncio.sleep(0)
        lost.cancel()
        samples = await kept
        assert lost.cancelled()
        return samples

    assert len(run(story())) == 1


def test_before_it_starts_it_says_so(scorer: Kind, run: Run[Any]) -> None:
    engine = scorer.make()
    with pytest.raises(PipelineError, match="before start"):
        run(engine.sample(TOKENS, 1, SampleParams(1)))
    with pytest.raises(PipelineError, match="before start"):
        run(engine.compute_logprobs(TOKENS))
    run(engine.close())


def that_ends(reference: Any, end: int) -> tuple[int, ...]:
    """A prompt after which the reference finds ``end`` most likely."""
    seconds = torch.arange(512)
    for first in range(512):
        with torch.inference_mode():
            pairs = torch.stack([torch.full_like(seconds, first), seconds], dim=1)
            found = (reference(pairs).logits[:, -1].argmax(-1) == end).nonzero()
        if len(found):
            return first, int(found[0])
    raise AssertionError("the model never ends")


def tokens_of(samples: list[SampledTokens]) -> list[tuple[int, ...]]:
    return [sample.tokens for sample in samples]
