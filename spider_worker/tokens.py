"""The words of work on token ids: sampling them, and scoring given ones.

One convention for indices everywhere: entry ``i`` of an array belongs to token ``i``, and a
log-probability there is that of token ``i`` given the tokens before it. Nothing precedes token 0,
so its entry is NaN. Services that shift by one, or leave the first entry out, are put right by the
adapter that speaks to them, once, and nowhere else.

A leaf: engines, trainers, ``distill`` and pipelines meet in these words and not in each other.
"""

from __future__ import annotations

__all__ = [
    "Ids",
    "LogitEngine",
    "SampleParams",
    "SampledTokens",
    "TokenEngine",
    "TokenEngineInfo",
    "TokenScores",
    "TopK",
]

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = Sequence[int]


@dataclasses.dataclass(frozen=True, slots=True)
class SampleParams:
    """How to sample. ``stop`` are token ids that end a sample and stay its last token; ``seed``
    None samples freely, otherwise sample ``k`` of a prompt is a function of the weights, the
    prompt, ``seed`` and ``k``. ``top_k`` 0 means all tokens."""

    max_tokens: int
    stop: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SampledTokens:
    """One sample. ``logprobs`` (N,) float32, those of the distribution that ``tokens`` (N,) were
    drawn from, at temperature 1 the policy's own. ``stop_reason`` ``stop``: the last token is a
    stop token; ``length``: it is not."""

    tokens: tuple[int, ...]
    logprobs: NDArray[np.float32]
    stop_reason: Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TopK:
    """The K most probable tokens at each position of a sequence of N.

    ``ids`` (N, K) int64, -1 where there are fewer; ``logprobs`` (N, K) float32, -inf there. Row
    ``i`` is the distribution that token ``i`` was scored under; row 0 is empty.
    """

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """``logprobs`` (N,) float32, entry 0 NaN; entries before the ``start`` that was asked for may
    be NaN too. ``topk`` None where none was asked for."""

    logprobs: NDArray[np.float32]
    topk: TopK | None = None


@dataclasses.dataclass(frozen=True)
class TokenEngineInfo:
    """``topk`` is the most per position that ``compute_logprobs`` can return (0: none);
    ``context`` the most tokens of a sequence (None: unknown)."""

    name: str
    topk: int = 0
    context: int | None = None


class TokenEngine(Protocol):
    """A model that takes and gives token ids. All methods are called from one event loop, any
    number of requests at once; the engine decides how they are batched and owns their retries."""

    @property
    def info(self) -> TokenEngineInfo: ...

    async def start(self) -> None:
        """Load the model or open connections. Raises EngineUnavailable, AuthError."""

    async def sample(self, prompt: Ids, n: int, params: SampleParams) -> list[SampledTokens]:
        """``n`` continuations of ``prompt`` (not empty). Raises EngineUnavailable when no retry
        helped, RowError for a prompt that leaves no room in the context, AuthError."""

    async def compute_logprobs(self, tokens: Ids, *, start: int = 1, topk: int = 0) -> TokenScores:
        """Score ``tokens[start:]``, each given all tokens before it. Raises as ``sample``."""

    async def close(self) -> None:
        """Free the device, processes and connections. Idempotent."""


class LogitEngine(TokenEngine, Protocol):
    """A model whose whole distributions are to be had."""

    async def compute_distributions(self, tokens: Ids, positions: Sequence[int]) -> Any:
        """(P, V) float32 torch tensor on the CPU: row ``p`` is the log-distribution over the token
        at ``positions[p]``, given the tokens before it (so 0 is no valid position)."""
