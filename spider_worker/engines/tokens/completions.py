"""The words of ``/completions`` on token ids: how a server is asked for scores and samples, and
what its answers mean.

Two ways to ask for the scores of given tokens are about. vLLM has ``prompt_logprobs``: for each
token of the prompt, the first left out as null, a mapping from token ids to log-probabilities, the
token itself always among them. Others know OpenAI's old ``echo`` alone: the prompt comes back
before what was generated, in ``logprobs.token_logprobs``. There the most probable tokens are named
by their texts, which need not tell two tokens apart, so they are not asked for.

Readers raise EndpointError for an answer that another try may mend, FatalJobError for one that is
wrong, and return None for one without what was asked for.
"""

from __future__ import annotations

__all__ = [
    "Dialect",
    "EchoDialect",
    "PromptLogprobsDialect",
    "no_scores",
    "read_context",
    "read_samples",
]

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import orjson

from spider_sdk.errors import FatalJobError
from spider_worker.engines.wire import EndpointError, error_message
from spider_worker.tokens import SampledTokens, SampleParams, TokenScores, TopK

#: What JSON cannot hold is sent as this by vLLM: minus infinity.
_FLOOR: Final = -9999.0
_ID: Final = "token_id:"

Body = dict[str, Any]
Tokens = Sequence[int]


class Dialect(abc.ABC):
    """How one kind of server is spoken to. ``topk``: whether it tells the most probable tokens of
    a position. Entries are read from ``start``, which counts from 1."""

    topk: bool

    @abc.abstractmethod
    def score(self, tokens: Tokens, topk: int) -> Body: ...

    @abc.abstractmethod
    def read_scores(
        self, answer: bytes, tokens: Tokens, start: int, topk: int
    ) -> TokenScores | None: ...

    @abc.abstractmethod
    def sample(self, prompt: Tokens, n: int, limit: int, params: SampleParams) -> Body:
        """``n`` samples of at most ``limit`` tokens, without a seed. Samplers that a model's
        own defaults would switch on are switched off."""


class PromptLogprobsDialect(Dialect):
    topk = True

    def score(self, tokens: Tokens, topk: int) -> Body:
        # vLLM generates a token at least.
        return {
            "prompt": list(tokens),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": topk,
        }

    def read_scores(
        self, answer: bytes, tokens: Tokens, start: int, topk: int
    ) -> TokenScores | None:
        _, (choice, *_) = _choices(answer)
        rows = choice.get("prompt_logprobs")
        if rows is None:
            return None
        rows = _whole(rows, len(tokens))
        scores = _Scores(len(tokens), topk)
        for at in range(start, len(tokens)):
            row = {int(token): float(one["logprob"]) for token, one in rows[at].items()}
            if tokens[at] not in row:
                raise FatalJobError(
                    f"the server's prompt_logprobs {at} are not those of token {at}, {tokens[at]}"
                )
            scores.put(at, row[tokens[at]], row)
        return scores.made()

    def sample(self, prompt: Tokens, n: int, limit: int, params: SampleParams) -> Body:
        return {
            **_sample(prompt, n, limit, params),
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "logprobs": 0,
            "stop_token_ids": list(params.stop),
            "ignore_eos": True,
            "return_tokens_as_token_ids": True,
        }


@dataclasses.dataclass(frozen=True)
class EchoDialect(Dialect):
    """``generated`` tokens are asked for besides, at a server that takes no 0."""

    generated: int = 0
    topk = False

    def score(self, tokens: Tokens, topk: int) -> Body:  # noqa: ARG002
        return {
            "prompt": list(tokens),
            "max_tokens": self.generated,
            "temperature": 0,
            "echo": True,
            "logprobs": 1,
        }

    def read_scores(
        self,
        answer: bytes,
        tokens: Tokens,
        start: int,
        topk: int,  # noqa: ARG002
    ) -> TokenScores | None:
        document, (choice, *_) = _choices(answer)
        rows = (choice.get("logprobs") or {}).get("token_logprobs")
        if rows is None:
            return None
        if self.generated:
            made = (document.get("usage") or {}).get("completion_tokens", self.generated)
            rows = rows[: len(rows) - int(made)]
        rows = _whole(rows, len(tokens))
        scores = _Scores(len(tokens), 0)
        for at in range(start, len(tokens)):
            scores.put(at, float(rows[at]), {})
        return scores.made()

    def sample(self, prompt: Tokens, n: int, limit: int, params: SampleParams) -> Body:
        return {**_sample(prompt, n, limit, params), "logprobs": 1}


def read_samples(
    answer: bytes, n: int, limit: int, params: SampleParams
) -> list[SampledTokens] | None:
    """The ``n`` choices of an answer, in their order."""
    _, choices = _choices(answer)
    if len(choices) != n:
        raise FatalJobError(f"the server gave {len(choices)} samples where {n} were asked for")
    ordered = sorted(choices, key=lambda choice: int(choice.get("index", 0)))
    samples = [_sampled(choice, limit, params) for choice in ordered]
    found = [sample for sample in samples if sample is not None]
    return found if len(found) == n else None


def read_context(answer: bytes, model: str) -> int | None:
    """The ``max_model_len`` of ``model`` in an answer of ``/models``; None where it is not told."""
    for entry in _json(answer).get("data") or ():
        if entry.get("id") == model:
            length = entry.get("max_model_len")
            return length if isinstance(length, int) and length > 1 else None
    return None


def no_scores(count: int, topk: int) -> TokenScores:
    """Where nothing was to be scored."""
    return _Scores(count, topk).made()


class _Scores:
    """TokenScores on their way."""

    def __init__(self, count: int, topk: int) -> None:
        self._logprobs = np.full(count, np.nan, np.float32)
        self._topk = topk
        self._ids = np.full((count, topk), -1, np.int64)
        self._best = np.full((count, topk), -np.inf, np.float32)

    def put(self, at: int, logprob: float, row: Mapping[int, float]) -> None:
        self._logprobs[at] = _unclamped(logprob)
        if self._topk:
            # Sent are the best and, where it is none of them, the token itself.
            best = sorted(row.items(), key=lambda one: -one[1])[: self._topk]
            self._ids[at, : len(best)] = [token for token, _ in best]
            self._best[at, : len(best)] = [_unclamped(value) for _, value in best]

    def made(self) -> TokenScores:
        top = TopK(self._ids, self._best) if self._topk else None
        return TokenScores(self._logprobs, top)


def _sampled(choice: Mapping[str, Any], limit: int, params: SampleParams) -> SampledTokens | None:
    logprobs = choice.get("logprobs") or {}
    ids = choice.get("token_ids") or logprobs.get("token_ids")
    if ids is None:
        texts = [str(text) for text in logprobs.get("tokens") or ()]
        if not texts or not all(text.startswith(_ID) for text in texts):
            return None
        ids = [text.removeprefix(_ID) for text in texts]
    values = logprobs.get("token_logprobs") or []
    if not ids or len(ids) != len(values) or len(ids) > limit:
        raise FatalJobError(
            f"the server gave {len(ids)} tokens and {len(values)} log-probabilities of them where"
            f" at most {limit} tokens were asked for"
        )
    tokens = tuple(map(int, ids))
    # A server that does not know of stop tokens goes on behind one.
    end = next((at + 1 for at, token in enumerate(tokens) if token in params.stop), len(tokens))
    return SampledTokens(
        tokens[:end],
        np.array([_unclamped(float(value)) for value in values[:end]], np.float32),
        "stop" if tokens[end - 1] in params.stop else "length",
    )


def _sample(prompt: Tokens, n: int, limit: int, params: SampleParams) -> Body:
    return {
        "prompt": list(prompt),
        "n": n,
        "max_tokens": limit,
        "temperature": params.temperature,
        "top_p": 1.0,
    }


def _choices(answer: bytes) -> tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]:
    document = _json(answer)
    choices = document.get("choices")
    if not choices:
        failure = document.get("error")
        code = failure.get("code") if isinstance(failure, dict) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else 0
        said = error_message(answer) if failure else "no choices in the answer"
        raise EndpointError(said, status)
    return document, choices


def _json(answer: bytes) -> Mapping[str, Any]:
    try:
        document = orjson.loads(answer)
    except orjson.JSONDecodeError as error:
        raise EndpointError(f"malformed JSON: {error}") from error
    if not isinstance(document, dict):
        raise EndpointError(f"an answer of unknown shape: {answer[:200]!r}")
    return document


def _whole(rows: Sequence[Any], count: int) -> Sequence[Any]:
    """An entry for each of ``count`` tokens. Servers differ in whether they leave out the first,
    of which there is nothing to say."""
    given = len(rows)
    if given == count - 1:
        rows = [None, *rows]
    if len(rows) != count or any(row is None for row in rows[1:]):
        raise FatalJobError(
            f"the server gave {given} scores for {count} tokens, or left some of them empty"
        )
    return rows


def _unclamped(logprob: float) -> float:
    return -np.inf if logprob <= _FLOOR else logprob
