"""The local teacher against a plain forward pass of its model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spider_sdk.errors import EngineUnavailable, NotSupported, PipelineError, RowError
from spider_worker.engines.tokens.torch_engine import TorchTokenEngine
from spider_worker.tokens import SampleParams
from spider_worker.torch_models import decoding, scoring, serving
from tests.support.tiny_model import tiny_model

__all__ = ["tiny_model"]

TOKENS = (5, 9, 30, 41, 8, 17, 44, 44, 200)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as loop:
        yield loop


@pytest.fixture(scope="module")
def engine(tiny_model: Path, runner: asyncio.Runner) -> Iterator[TorchTokenEngine]:
    teacher = TorchTokenEngine(str(tiny_model), parameters={"max_model_len": 64, "max_batch": 6})
    runner.run(teacher.start())
    yield teacher
    runner.run(teacher.close())


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def table(plain: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    """(N, V): row i the log-distribution of token i; row 0 is of no use."""
    with torch.inference_mode():
        logits = plain(torch.tensor([tokens])).logits[0]
    return torch.cat([torch.full_like(logits[:1], torch.nan), logits[:-1].log_softmax(-1)])


def test_each_score_is_of_its_own_token(
    engine: TorchTokenEngine, plain: Any, runner: asyncio.Runner
) -> None:
    scores = runner.run(engine.compute_logprobs(TOKENS, topk=5))
    want = table(plain, TOKENS)
    assert np.isnan(scores.logprobs[0])
    for at in range(1, len(TOKENS)):
        assert scores.logprobs[at] == pytest.approx(want[at, TOKENS[at]].item(), abs=1e-4)
    assert scores.topk is not None
    values, ids = want[1:].topk(5)
    np.testing.assert_array_equal(scores.topk.ids[1:], ids)
    np.testing.assert_allclose(scores.topk.logprobs[1:], values, atol=1e-4)
    assert (scores.topk.ids[0] == -1).all()
    assert np.isneginf(scores.topk.logprobs[0]).all()


def test_a_start_leaves_the_others_out(
    engine: TorchTokenEngine, plain: Any, runner: asyncio.Runner
) -> None:
    scores = runner.run(engine.compute_logprobs(TOKENS, start=6))
    want = table(plain, TOKENS)
    assert np.isnan(scores.logprobs[:6]).all()
    assert scores.logprobs[6] == pytest.approx(want[6, TOKENS[6]].item(), abs=1e-4)
    assert scores.topk is None


def test_a_single_token_has_no_score(engine: TorchTokenEngine, runner: asyncio.Runner) -> None:
    scores = runner.run(engine.compute_logprobs((5,), topk=2))
    assert np.isnan(scores.logprobs).all()
    assert scores.logprobs.shape == (1,)


def test_more_topk_than_tokens_is_padded(engine: TorchTokenEngine, runner: asyncio.Runner) -> None:
    scores = runner.run(engine.compute_logprobs(TOKENS, topk=600))
    assert scores.topk is not None
    assert scores.topk.ids.shape == (9, 600)
    assert (scores.topk.ids[1:, 512:] == -1).all()
    assert np.exp(scores.topk.logprobs[1:]).sum(1) == pytest.approx(1, abs=1e-4)


def test_distributions_are_of_the_token_at_the_position(
    engine: TorchTokenEngine,
    plain: Any,
    runner: asyncio.Runner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    want = table(plain, TOKENS)
    for logits in (1 << 25, 512):
        monkeypatch.setattr(scoring, "LOGITS", logits)
        found = runner.run(engine.compute_distributions(TOKENS, (8, 1, 4)))
        assert found.shape == (3, 512)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, want[[8, 1, 4]], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="count from 1"):
        runner.run(engine.compute_distributions(TOKENS, (0,)))


def test_calls_that_come_together_are_answered_together(
    engine: TorchTokenEngine, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    score = scoring.score
    monkeypatch.setattr(scoring, "score", lambda *a: passes.append(len(a[1])) or score(*a))
    calls = [TOKENS[:length] for length in (3, 9, 5)]

    async def together() -> Any:
        return await asyncio.gather(*(engine.compute_logprobs(tokens) for tokens in calls))

    found = runner.run(together())
    assert passes == [3]
    whole = runner.run(engine.compute_logprobs(TOKENS)).logprobs
    for tokens, scores in zip(calls, found, strict=True):
        np.testing.assert_allclose(scores.logprobs, whole[: len(tokens)], atol=1e-4)


@pytest.mark.parametrize(
    ("budget", "sizes"), [(1 << 30, [256, 44]), (100, [100, 100, 100]), (1, [64, 64, 64, 64, 44])]
)
def test_as_many_are_sampled_together_as_their_caches_leave_room_for(
    tiny_model: Path, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch,
    budget: int, sizes: list[int],
) -> None:  # fmt: skip
    together = []
    decode = decoding.decode

    def counted(model: Any, rows: Any, *more: Any, **options: Any) -> Any:
        together.append(len(rows))
        return decode(model, rows, *more, **options)

    monkeypatch.setattr(decoding, "decode", counted)
    engine = TorchTokenEngine(str(tiny_model), parameters={"device": "cpu"})

    async def story() -> int:
        await engine.start()
        model = engine._model
        assert model is not None
        assert model.cache_bytes is not None
        drawn = model.vocabulary * serving._DRAWING_BYTES
        of_one = model.cache_bytes * (len(TOKENS) + 2) + drawn
        monkeypatch.setattr(serving, "_BYTES", budget * of_one if budget <= 256 else budget)
        samples = await engine.sample(TOKENS, 300, SampleParams(2, seed=1))
        await engine.close()
        return len(samples)

    assert runner.run(story()) == 300
    assert together == sizes


def test_samples_carry_the_logprobs_they_were_drawn_with(
    engine: TorchTokenEngine, plain: Any, runner: asyncio.Runner
) -> None:
    """Prompts of several lengths, and more rows than a batch holds."""
    prompts = [TOKENS[:2], TOKENS, TOKENS[:5]]

    async def together() -> Any:
        params = SampleParams(12, seed=1)
        return await asyncio.gather(*(engine.sample(p, 3, params) for p in prompts))

    for prompt, samples in zip(prompts, runner.run(together()), strict=True):
        assert len({s.tokens for s in samples}) == 3
        for sample in samples:
            assert len(sample.tokens) == 12
            assert sample.stop_reason == "length"
            want = table(plain, (*prompt, *sample.tokens))
            for at, (token, logprob) in enumerate(
                zip(sample.tokens, sample.logprobs, strict=True), len(prompt)
            ):
                assert logprob == pytest.approx(want[at, token].item(), abs=1e-4)


def test_a_seed_decides_whatever_the_company(
    engine: TorchTokenEngine, runner: asyncio.Runner
) -> None:
    params = SampleParams(10, seed=4)
    alone = runner.run(engine.sample(TOKENS, 2, params))

    async def in_company() -> Any:
        others = [engine.sample(TOKENS[:4], 3, SampleParams(5, seed=9)) for _ in range(2)]
        return (await asyncio.gather(*others, engine.sample(TOKENS, 2, params)))[-1]

    assert [s.tokens for s in runner.run(in_company())] == [s.tokens for s in alone]
    other = runner.run(engine.sample(TOKENS, 2, SampleParams(10, seed=5)))
    free = [runner.run(engine.sample(TOKENS, 1, SampleParams(10))) for _ in range(2)]
    assert len({s.tokens for s in (*alone, *other, *free[0], *free[1])}) == 6


def test_a_stop_token_ends_a_sample_and_stays(
    engine: TorchTokenEngine, runner: asyncio.Runner
) -> None:
    """Rows leave at different times; what the others say stays as it was."""
    whole = runner.run(engine.sample(TOKENS, 6, SampleParams(20, seed=2)))
    stops = {s.tokens[at] for at, s in zip((2, 5, 5, 9), whole, strict=False)}
    cut = runner.run(engine.sample(TOKENS, 6, SampleParams(20, tuple(stops), seed=2)))
    lengths = set()
    for one, other in zip(whole, cut, strict=True):
        end = next((i + 1 for i, token in enumerate(one.tokens) if token in stops), 20)
        lengths.add(end)
        assert other.tokens == one.tokens[:end]
        assert other.stop_reason == ("stop" if one.tokens[end - 1] in stops else "length")
        np.testing.assert_allclose(other.logprobs, one.logprobs[:end], atol=1e-4)
    assert len(lengths) > 2


def test_a_sample_ends_where_the_context_does(
    engine: TorchTokenEngine, runner: asyncio.Runner
) -> None:
    (sample,) = runner.run(engine.sample((7,) * 60, 1, SampleParams(10, seed=1)))
    assert len(sample.tokens) == 4
    assert sample.stop_reason == "length"


def test_what_the_context_does_not_hold_is_a_rows_error(
    engine: TorchTokenEngine, runner: asyncio.Runner
) -> None:
    calls = (
        engine.sample((7,) * 64, 1, SampleParams(1)),
        engine.compute_logprobs((7,) * 65),
        engine.compute_distributions((7,) * 65, (1,)),
    )
    for call in calls:
        with pytest.raises(RowError, match="64 tokens") as caught:
            runner.run(call)
        assert caught.value.kind == "context"
    assert len(runner.run(engine.compute_logprobs((7,) * 64)).logprobs) == 64


def test_tokens_that_are_none_are_a_rows_error(
    engine: TorchTokenEngine, runner: asyncio.Runner
) -> None:
    for tokens, kind in (((), "empty"), ((5, 512), "vocabulary"), ((-1, 5), "vocabulary")):
        with pytest.raises(RowError) as caught:
            runner.run(engine.compute_logprobs(tokens))
        assert caught.value.kind == kind


def test_a_call_that_is_given_up_does_not_hold_the_others(
    engine: TorchTokenEngine, runner: asyncio.Runner
) -> None:
    async def story() -> Any:
        lost = asyncio.ensure_future(engine.sample(TOKENS, 6, SampleParams(50)))
        await asyncio.sleep(0)
        lost.cancel()
        kept = await engine.sample(TOKENS, 1, SampleParams(2))
        assert lost.cancelled()
        return kept

    assert len(runner.run(story())) == 1


def test_a_batch_that_nobody_waits_for_ends(
    engine: TorchTokenEngine, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    advance = decoding._Batch.advance
    began = asyncio.Event()
    loop = runner.get_loop()

    def counted(batch: Any) -> None:
        steps.append(1)
        loop.call_soon_threadsafe(began.set)
        gate.result(30)
        advance(batch)

    import concurrent.futures

    gate: concurrent.futures.Future[None] = concurrent.futures.Future()
    monkeypatch.setattr(decoding._Batch, "advance", counted)

    async def story() -> None:
        lost = asyncio.ensure_future(engine.sample(TOKENS, 1, SampleParams(50)))
        await began.wait()
        lost.cancel()
        await asyncio.sleep(0)
        gate.set_result(None)
        await engine.compute_logprobs(TOKENS)

    runner.run(story())
    assert len(steps) == 1


def test_info_and_life(tiny_model: Path, runner: asyncio.Runner) -> None:
    engine = TorchTokenEngine(str(tiny_model))
    with pytest.raises(PipelineError, match="before start"):
        runner.run(engine.compute_logprobs(TOKENS))
    runner.run(engine.start())
    assert (engine.info.topk, engine.info.context) == (512, 1024)
    runner.run(engine.close())
    runner.run(engine.close())
    with pytest.raises(PipelineError, match="after close"):
        runner.run(engine.compute_logprobs(TOKENS))


def test_closing_answers_everyone(tiny_model: Path, runner: asyncio.Runner) -> None:
    async def story() -> Any:
        engine = TorchTokenEngine(str(tiny_model))
        await engine.start()
        running = asyncio.ensure_future(engine.sample(TOKENS, 4, SampleParams(100)))
        for _ in range(4):
            await asyncio.sleep(0)
        waiting = asyncio.ensure_future(engine.sample(TOKENS, 1, SampleParams(2)))
        await asyncio.sleep(0)
        await engine.close()
        return await asyncio.wait_for(
            asyncio.gather(running, waiting, return_exceptions=True), timeout=30
        )

    first, second = runner.run(story())
    assert isinstance(first, (list, PipelineError))  # as it had begun or not
    assert isinstance(second, PipelineError)


def test_what_cannot_be_is_refused(tmp_path: Path, runner: asyncio.Runner) -> None:
    with pytest.raises(NotSupported, match="did you mean 'dtype'"):
        TorchTokenEngine("x", parameters={"dtyp": "auto"})
    engine = TorchTokenEngine(str(tmp_path))
    with pytest.raises(EngineUnavailable, match="could not be loaded"):
        runner.run(engine.start())
    runner.run(engine.close())
