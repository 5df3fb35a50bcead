"""A teacher shows that its scores mean what they should, before the first step.

Three things go wrong with scoring services and show nowhere but in the result of a run: scores
that belong to a neighbouring token, scores of something else than what was sent, scores that vary.
"""

from __future__ import annotations

__all__ = ["check_scorer"]

import random
from typing import Final

import numpy as np

from spider_sdk.errors import FatalJobError
from spider_worker.engines.tokens.text import TokenizerText
from spider_worker.tokens import SampleParams, TokenEngine

#: Asked of every teacher; what is scored is its own answer, which any model finds likely.
_QUESTION: Final = "What is 12 plus 30? Count from one to twenty, then name the days of the week."
_ANSWER_TOKENS: Final = 24
#: Nats that a log-probability may differ by when it is asked for twice: engines batch differently.
_TOLERANCE: Final = 0.1


async def check_scorer(engine: TokenEngine, text: TokenizerText, name: str) -> None:
    """Score a text twice, with another last token, and shuffled. Raises FatalJobError that names
    the check that failed."""
    tokens = await _likely_text(engine, text)
    first = await _score(engine, tokens, name)
    again = await _score(engine, tokens, name)
    drift = float(np.abs(first[1:] - again[1:]).max())
    if drift > _TOLERANCE:
        raise _failed(name, "the same text scored twice gives other values", f"by {drift:.3f} nats")
    changed = [*tokens[:-1], tokens[0] if tokens[-1] != tokens[0] else tokens[1]]
    other = await _score(engine, changed, name)
    moved = np.flatnonzero(np.abs(other[1:] - first[1:]) > _TOLERANCE) + 1
    if moved.size and moved[0] != len(tokens) - 1:
        raise _failed(
            name,
            "with another last token the score of an earlier one changes, so entries do not"
            " belong to their tokens",
            f"entry {moved[0]} of {len(tokens)} moved",
        )
    if not moved.size:
        raise _failed(
            name,
            "with another last token no score changes, so entries do not belong to their tokens",
            f"the last entry is {first[-1]:.3f} both times",
        )
    shuffled = list(tokens)
    random.Random(0).shuffle(shuffled)  # noqa: S311 (a fixed order, no secret)
    mixed = await _score(engine, shuffled, name)
    if mixed[1:].mean() >= first[1:].mean():
        raise _failed(
            name,
            "a shuffled text scores no worse than the text itself",
            f"{mixed[1:].mean():.3f} against {first[1:].mean():.3f} nats a token",
        )


async def _likely_text(engine: TokenEngine, text: TokenizerText) -> list[int]:
    """A prompt and the teacher's own greedy answer."""
    prompt = text.render([{"role": "user", "content": _QUESTION}])
    params = SampleParams(_ANSWER_TOKENS, temperature=0.0)
    (answer,) = await engine.sample(prompt, 1, params)
    return [*prompt, *answer.tokens]


async def _score(engine: TokenEngine, tokens: list[int], name: str) -> np.ndarray:
    scores = (await engine.compute_logprobs(tokens)).logprobs
    if len(scores) != len(tokens):
        raise _failed(
            name, "there must be a score for each token", f"{len(scores)} for {len(tokens)} tokens"
        )
    bad = np.flatnonzero(np.isnan(scores[1:])) + 1
    if bad.size:
        raise _failed(name, "a score is no number", f"entry {bad[0]} of {len(tokens)}")
    if (scores[1:] > _TOLERANCE).any():
        raise _failed(name, "a log-probability is above 0", f"{float(scores[1:].max()):.3f}")
    return scores.astype(np.float64)


def _failed(name: str, what: str, figures: str) -> FatalJobError:
    return FatalJobError(
        f"teacher {name} failed its self-test: {what} ({figures}). Training on such scores would"
        " teach noise: check the server's version, its prompt_logprobs, and that parameters.tokenizer"
        " is the served model's"
    )
