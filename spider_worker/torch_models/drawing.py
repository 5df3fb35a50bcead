"""From logits to a token, by one number of [0, 1) for each draw.

The number is looked up in the cumulative distribution, so that a draw costs one random number
and not one for each token of the vocabulary, and depends on nothing else in its batch.
"""

from __future__ import annotations

__all__ = ["draw", "uniforms"]

import hashlib
import secrets
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from spider_worker.tokens import Ids, SampleParams

_BELOW_ONE: Final = 1 - 2.0**-40  # so that u · total stays below total in float64


def uniforms(prompt: Ids, seed: int | None, number: int, count: int) -> NDArray[np.float64]:
    """(count,) numbers of [0, 1) for sample ``number`` of ``prompt``: a function of the three,
    each number of its place alone. The prompt is in it so that prompts under one seed do not
    draw alike. ``seed`` None: of the system's randomness."""
    if seed is None:
        key = secrets.token_bytes(16)
    else:
        text = f"{seed},{number}:".encode() + np.asarray(prompt, np.int64).tobytes()
        key = hashlib.blake2b(text, digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return generator.random(count)


def draw(
    logits: torch.Tensor, numbers: torch.Tensor, params: SampleParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B,) and their log-probabilities (B,) float32, from ``logits`` (B, V) float32 and
    ``numbers`` (B,) float64. The log-probabilities are those of the distribution after
    temperature, top_k and top_p; at temperature 0, where that is a single token, the model's."""
    if params.temperature == 0:
        logprobs = logits.log_softmax(dim=1)
        best = logprobs.argmax(dim=1, keepdim=True)
        return best.squeeze(1), logprobs.gather(1, best).squeeze(1)
    if params.temperature != 1:
        logits = logits / params.temperature
    if params.top_k > 0 or params.top_p < 1:
        logits = _filtered(logits, params)
    probs = logits.softmax(dim=1)
    # float64: in float32 the sum over a large vocabulary would swallow its tail.
    cumulative = probs.cumsum(dim=1, dtype=torch.float64)
    sought = numbers.clamp(max=_BELOW_ONE).unsqueeze(1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, sought, right=True)
    tokens.clamp_(max=logits.shape[1] - 1)  # logits that are NaN; the caller sees it in logprobs
    return tokens.squeeze(1), probs.gather(1, tokens).squeeze(1).log()


def _filtered(logits: torch.Tensor, params: SampleParams) -> torch.Tensor:
    """Minus infinity for what top_k and top_p cut off; the best token always stays."""
    ordered, order = logits.sort(dim=1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if params.top_k > 0:
        keep[:, params.top_k :] = False
    if params.top_p < 1:
        # As elsewhere, top_p is of what top_k has left.
        probabilities = ordered.masked_fill(~keep, float("-inf")).softmax(dim=1)
        keep &= probabilities.cumsum(dim=1) - probabilities < params.top_p
    keep[:, 0] = True
    ordered = ordered.masked_fill(~keep, float("-inf"))
    return torch.empty_like(logits).scatter(1, order, ordered)
