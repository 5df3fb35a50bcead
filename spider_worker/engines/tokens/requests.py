"""What every token engine asks of a request before it is sent on."""

from __future__ import annotations

__all__ = ["checked", "limit", "sample_seeds"]

import hashlib

import numpy as np

from spider_sdk.errors import RowError
from spider_worker.tokens import Ids, SampleParams


def checked(tokens: Ids, *, vocabulary: int | None, context: int | None) -> tuple[int, ...]:
    """The ids, as plain numbers. ``vocabulary`` and ``context`` None: unknown, and left to whoever
    runs the model. Raises RowError for none, for one that is no token, for too many."""
    ids = tuple(map(int, tokens))
    if not ids:
        raise RowError("there are no tokens", stage="generation", kind="empty")
    # An index past the embedding would bring a GPU down with all that is on it.
    if min(ids) < 0 or (vocabulary is not None and max(ids) >= vocabulary):
        bad = min(ids) if min(ids) < 0 else max(ids)
        raise RowError(
            f"token {bad} is none of the model's {vocabulary or 'vocabulary'}",
            stage="generation",
            kind="vocabulary",
        )
    if context is not None and len(ids) > context:
        raise _overflow(len(ids), "does not fit", context)
    return ids


def limit(prompt: Ids, n: int, params: SampleParams, *, context: int | None) -> int:
    """The most tokens that a sample of ``prompt`` may have. Raises RowError where there is no
    room for one."""
    if n < 1 or params.max_tokens < 1:
        raise ValueError(f"n and max_tokens count from 1, not {n} and {params.max_tokens}")
    if context is None:
        return params.max_tokens
    if len(prompt) >= context:
        raise _overflow(len(prompt), "leaves no room for a sample in", context)
    return min(params.max_tokens, context - len(prompt))


def sample_seeds(prompt: Ids, seed: int | None, n: int, *, bits: int) -> tuple[int | None, ...]:
    """A seed for each of ``n`` samples. The prompt is in it so that prompts under one seed do not
    draw alike, and a hash so that sample 1 of one seed is not sample 0 of the next."""
    if seed is None:
        return (None,) * n
    tokens = np.asarray(prompt, np.int64).tobytes()
    return tuple(
        int.from_bytes(
            hashlib.blake2b(f"{seed},{number}:".encode() + tokens, digest_size=8).digest(), "big"
        )
        >> (64 - bits)
        for number in range(n)
    )


def _overflow(count: int, what: str, context: int) -> RowError:
    return RowError(
        f"a sequence of {count} tokens {what} the context of {context} tokens",
        stage="generation",
        kind="context",
    )
