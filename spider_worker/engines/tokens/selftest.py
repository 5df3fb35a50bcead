"""A teacher shows that its scores mean what they should, before the first step.

Three things go wrong with scoring services and show nowhere but in the result of a run: scores
that belong to a neighbouring token, scores of something else than what was sent, scores that vary.
"""

from __future__ import annotations

__all__ = ["check_scorer"]

import random
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from spider_sdk.errors import FatalJobError, NotSupported, RowError
from spider_worker.distill.vocabulary import Vocabulary
from spider_worker.tokens import SampleParams, TokenEngine, TokenScores, TopK

Scores = NDArray[np.float64]

#: What is scored is the teacher's own answer to it, which any model finds likely.
_QUESTION: Final = "What is 12 plus 30? Count from one to twenty, then name the days of the week."
_ANSWER_TOKENS: Final = 24
#: Scored in the place of an answer where a server only scores: predictable to any model of English.
_KNOWN: Final = (
    "One, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve. Monday, Tuesday,"
    " Wednesday, Thursday, Friday, Saturday, Sunday. A, B, C, D, E, F, G, H, I, J, K."
)
#: Nats that a token's score may differ by, in the mean, when it is asked for twice: engines batch
#: differently, and logits in bfloat16 are a sixteenth apart.
_TOLERANCE: Final = 0.1
#: What stands for a score of minus infinity, so that differences are numbers.
_FLOOR: Final = -1e4
_TOPK: Final = 5


class Renderer(Protocol):
    """What is asked of the teacher's text here."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def render(self, messages: Sequence[Mapping[str, Any]]) -> list[int]: ...


async def check_scorer(engine: TokenEngine, text: Renderer, name: str) -> None:
    """Score a text twice, with another last token, and shuffled. Raises FatalJobError that names
    the check that failed."""
    try:
        await _check(engine, text, name)
    except RowError as error:
        raise FatalJobError(
            f"teacher {name} could not take its self-test, a short question and its answer:"
            f" {error.message}"
        ) from error


async def _check(engine: TokenEngine, text: Renderer, name: str) -> None:
    prompt, answer = await _likely_text(engine, text)
    tokens = [*prompt, *answer]
    topk = min(_TOPK, engine.info.topk)
    scored = await engine.compute_logprobs(tokens, topk=topk)
    first = _checked(scored, tokens, name)
    again = _checked(await engine.compute_logprobs(tokens, topk=topk), tokens, name)
    drift = np.abs(first - again).mean()
    if drift > _TOLERANCE:
        raise _failed(
            name, "the same text scored twice gives other values", f"{drift:.3f} nats a token"
        )
    changed = [*tokens[:-1], _another(tokens)]
    other = _checked(await engine.compute_logprobs(changed), changed, name)
    _check_places(first, other, name)
    shuffled = list(tokens)
    random.Random(0).shuffle(shuffled)  # noqa: S311 (a fixed order, no secret)
    mixed = _checked(await engine.compute_logprobs(shuffled), shuffled, name)
    # Without the last, which has been looked at.
    worse, better = mixed[:-1].sum(), first[:-1].sum()
    if worse >= better:
        raise _failed(
            name,
            "a shuffled text scores no worse than the text itself",
            f"{worse:.3f} against {better:.3f} nats in all",
        )
    if topk:
        _check_topk(scored.topk, np.asarray(tokens), first, max(1, len(prompt)), name)


async def _likely_text(engine: TokenEngine, text: Renderer) -> tuple[list[int], list[int]]:
    """A prompt, and the teacher's own greedy answer to it or what else is likely."""
    prompt = text.render([{"role": "user", "content": _QUESTION}])
    params = SampleParams(_ANSWER_TOKENS, temperature=0.0)
    try:
        (answer,) = await engine.sample(prompt, 1, params)
    except NotSupported:
        return prompt, text.vocabulary.encode(_KNOWN)
    return prompt, list(answer.tokens)


def _checked(scores: TokenScores, tokens: list[int], name: str) -> Scores:
    """(N - 1,): the scores from entry 1. Raises FatalJobError for what cannot be scores."""
    logprobs = scores.logprobs
    if len(logprobs) != len(tokens):
        found = f"{len(logprobs)} for {len(tokens)} tokens"
        raise _failed(name, "there must be a score for each token", found)
    bad = np.flatnonzero(np.isnan(logprobs[1:])) + 1
    if bad.size:
        raise _failed(name, "a score is no number", f"entry {bad[0]} of {len(tokens)}")
    if (logprobs[1:] > _TOLERANCE).any():
        raise _failed(name, "a log-probability is above 0", f"{float(logprobs[1:].max()):.3f}")
    return np.maximum(logprobs[1:].astype(np.float64), _FLOOR)


def _another(tokens: list[int]) -> int:
    """A token that is not the last one, out of the text where it has one."""
    last = tokens[-1]
    return next((token for token in tokens if token != last), 0 if last else 1)


def _check_places(first: Scores, other: Scores, name: str) -> None:
    """With another last token the last score alone is another."""
    moved = np.abs(other - first)
    last = len(moved) - 1
    if moved.max() <= _TOLERANCE:
        raise _failed(
            name,
            "with another last token no score changes, so entries do not belong to their tokens",
            f"the last entry is {first[last]:.3f} both times",
        )
    if moved.argmax() != last or (last and moved[:last].mean() > _TOLERANCE):
        at = int(moved[:last].argmax())
        raise _failed(
            name,
            "with another last token the score of an earlier one changes, so entries do not"
            " belong to their tokens",
            f"entry {at + 1} of {len(moved) + 1} moved by {moved[at]:.3f} nats",
        )


def _check_topk(top: TopK | None, tokens: Any, first: Scores, start: int, name: str) -> None:
    """The most probable tokens at a position are those that its token was scored among. From
    ``start`` on tokens are likely, so most must be found in their rows."""
    if top is None or top.ids.shape[0] != len(tokens) or top.ids.shape != top.logprobs.shape:
        raise _failed(name, "there must be a row of most probable tokens for each token", "top-k")
    if (top.logprobs[1:, 1:] > top.logprobs[1:, :-1]).any():
        raise _failed(name, "the most probable tokens of a position are not in order", "top-k")
    rows, columns = np.nonzero(top.ids[1:] == tokens[1:, None])
    apart = np.abs(top.logprobs[1:][rows, columns] - first[rows])
    found = np.unique(rows[rows >= start - 1]).size
    likely = len(tokens) - start
    if 2 * found < likely or (apart.size and apart.mean() > _TOLERANCE):
        raise _failed(
            name,
            "the most probable tokens of a position are not those of its token",
            f"{found} of {likely} tokens are among them",
        )


def _failed(name: str, what: str, figures: str) -> FatalJobError:
    return FatalJobError(
        f"teacher {name} failed its self-test: {what} ({figures}). Training on such scores would"
        " teach noise: check the server's version, its prompt_logprobs, and that"
        " parameters.tokenizer is the served model's"
    )
