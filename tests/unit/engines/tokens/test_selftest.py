"""The self-test passes a teacher that scores as it should, and none that is wrong on purpose."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spider_sdk.errors import FatalJobError, NotSupported, RowError
from spider_worker.engines.tokens.selftest import check_scorer
from spider_worker.engines.tokens.text import TokenizerText, load_text
from spider_worker.engines.tokens.torch_engine import TorchTokenEngine
from spider_worker.tokens import (
    Ids,
    SampledTokens,
    SampleParams,
    TokenEngine,
    TokenEngineInfo,
    TokenScores,
    TopK,
)

Spoil = Callable[[TokenScores], TokenScores]


class Wrong:
    """``engine`` with its scores spoiled. ``deaf`` scores another text than it is sent."""

    def __init__(
        self,
        engine: TokenEngine,
        spoil: Spoil = lambda scores: scores,
        *,
        topk: int = 0,
        deaf: Callable[[Ids], Ids] = lambda tokens: tokens,
        samples: bool = True,
    ) -> None:
        self._engine, self._spoil, self._deaf, self._samples = engine, spoil, deaf, samples
        self.info = TokenEngineInfo("wrong", topk=topk)

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def sample(self, prompt: Ids, n: int, params: SampleParams) -> list[SampledTokens]:
        if not self._samples:
            raise NotSupported("it only scores")
        return await self._engine.sample(prompt, n, params)

    async def compute_logprobs(self, tokens: Ids, *, start: int = 1, topk: int = 0) -> TokenScores:
        scores = await self._engine.compute_logprobs(self._deaf(tokens), start=start, topk=topk)
        return self._spoil(scores)


def logprobs(change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    return lambda scores: dataclasses.replace(scores, logprobs=change(scores.logprobs.copy()))


def top(change: Callable[[TopK], TopK | None]) -> Spoil:
    def spoil(scores: TokenScores) -> TokenScores:
        return scores if scores.topk is None else TokenScores(scores.logprobs, change(scores.topk))

    return spoil


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as loop:
        yield loop


@pytest.fixture(scope="module")
def engine(tiny_model: Path, runner: asyncio.Runner) -> Iterator[TorchTokenEngine]:
    teacher = TorchTokenEngine(str(tiny_model))
    runner.run(teacher.start())
    yield teacher
    runner.run(teacher.close())


@pytest.fixture(scope="module")
def text(tiny_model: Path) -> TokenizerText:
    return load_text(str(tiny_model))


@pytest.fixture
def refused(engine: TorchTokenEngine, text: TokenizerText, runner: asyncio.Runner) -> Any:
    """What the self-test says of a wrong engine."""

    def check(spoil: Spoil = lambda scores: scores, **options: Any) -> str:
        with pytest.raises(FatalJobError, match=r"^teacher wrong ") as caught:
            runner.run(check_scorer(Wrong(engine, spoil, **options), text, "wrong"))
        return caught.value.message

    return check


def test_a_teacher_that_scores_as_it_should_passes(
    engine: TorchTokenEngine, text: TokenizerText, runner: asyncio.Runner
) -> None:
    runner.run(check_scorer(engine, text, "tiny"))
    for topk in (0, 1, 3):
        runner.run(check_scorer(Wrong(engine, topk=topk), text, "tiny"))


def test_one_that_only_scores_is_shown_a_known_text(
    engine: TorchTokenEngine, text: TokenizerText, runner: asyncio.Runner, refused: Any
) -> None:
    """To weights of chance no text is likely, so the engine is helped to like the alphabet."""
    known = text.vocabulary.encode(" G, H, I, J")

    async def likes(tokens: Ids, *, start: int = 1, topk: int = 0) -> TokenScores:
        scores = await engine.compute_logprobs(tokens, start=start, topk=topk)
        liked = "".join(map(str, known)) in "".join(map(str, tokens))
        values = scores.logprobs.copy()
        values[1:-1] = -1.0 if liked else -2.0
        return dataclasses.replace(scores, logprobs=values)

    only = Wrong(engine, samples=False)
    only.compute_logprobs = likes  # type: ignore[method-assign]
    runner.run(check_scorer(only, text, "tiny"))
    said = refused(logprobs(np.zeros_like), samples=False)
    assert "no score changes" in said


def test_small_noise_is_let_through(
    engine: TorchTokenEngine, text: TokenizerText, runner: asyncio.Runner
) -> None:
    """Logits in bfloat16 differ by a step between two batches."""
    random = np.random.default_rng(0)
    jitter = logprobs(lambda v: v + np.where(random.random(v.shape) < 0.2, -0.125, 0.0))
    runner.run(check_scorer(Wrong(engine, jitter, topk=5), text, "tiny"))


@pytest.mark.parametrize(
    ("shift", "said"),
    [
        (lambda v: np.append(v[1:], v[-1]), "entries do not belong to their tokens"),
        (lambda v: np.append(np.nan, v[:-1])[:], "a score is no number"),
        (lambda v: np.append([np.nan, -1.0], v[1:-1]), "no score changes"),
    ],
    ids=["to-the-left", "to-the-right-with-its-nan", "to-the-right"],
)
def test_scores_of_the_neighbour(refused: Any, shift: Any, said: str) -> None:
    assert said in refused(logprobs(shift))


def test_scores_that_see_what_comes_after(refused: Any) -> None:
    """As a model that attends both ways would: every entry moves with the last token."""
    assert "score of an earlier one changes" in refused(
        logprobs(lambda v: np.append(np.nan, v[1:] + 0.3 * v[-1]))
    )


def test_scores_of_another_text(refused: Any) -> None:
    assert "no score changes" in refused(deaf=lambda tokens: [*tokens[:-1], tokens[-2]])
    assert "shuffled" in refused(
        logprobs(lambda v: np.concatenate([[np.nan], -5.0 + 0 * v[1:-1], v[-1:]]))
    )


def test_scores_that_are_always_the_same(refused: Any) -> None:
    assert "no score changes" in refused(logprobs(lambda v: np.full_like(v, -2.0)))
    assert "no score changes" in refused(logprobs(lambda v: np.full_like(v, -np.inf)))


def test_scores_that_vary(refused: Any) -> None:
    random = np.random.default_rng(0)
    said = refused(logprobs(lambda v: v - np.abs(random.normal(0, 1.0, v.shape))))
    assert "scored twice gives other values" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: -v, "above 0"),
        (lambda v: v[1:], "a score for each token"),
        (lambda v: np.append(v, -1.0), "a score for each token"),
        (lambda v: np.where(np.arange(len(v)) == 7, np.nan, v), "no number (entry 7 of"),
    ],
    ids=["positive", "short", "long", "nan"],
)
def test_what_cannot_be_scores(refused: Any, change: Any, said: str) -> None:
    assert said in refused(logprobs(change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: None, "a row of most probable tokens for each token"),
        (lambda t: TopK(t.ids[1:], t.logprobs[1:]), "a row of most probable tokens"),
        (lambda t: TopK(t.ids[:, ::-1], t.logprobs[:, ::-1]), "not in order"),
        (lambda t: TopK(np.roll(t.ids, -1, 0), np.roll(t.logprobs, -1, 0)), "of its token"),
        (lambda t: TopK(t.ids, t.logprobs - 1), "of its token"),
    ],
    ids=["none", "short", "order", "shifted", "other-values"],
)
def test_topk_that_is_wrong(refused: Any, change: Any, said: str) -> None:
    assert said in refused(top(change), topk=5)


def test_a_teacher_that_cannot_take_it_says_why(
    engine: TorchTokenEngine, text: TokenizerText, runner: asyncio.Runner
) -> None:
    class Short(Wrong):
        async def sample(self, *_: Any) -> Any:
            raise RowError("too long for 8 tokens", stage="generation", kind="context")

    with pytest.raises(FatalJobError, match=r"could not take its self-test.*too long for 8 tokens"):
        runner.run(check_scorer(Short(engine), text, "short"))
