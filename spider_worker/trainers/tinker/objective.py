"""A loss of the policy gradient as a function of log-probabilities, where the service does not
compute it itself or says nothing of its value."""

from __future__ import annotations

__all__ = ["evaluate"]

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spider_worker.trainers.base import Datum, Loss


def evaluate(
    loss: Loss, data: Sequence[Datum], logprobs: Sequence[NDArray[np.float32]]
) -> tuple[float, list[NDArray[np.float32]]]:
    """The loss, a sum over tokens, at ``logprobs``, (N,) for each datum; and its slope,
    −∂loss/∂log p of each token, 0 outside the mask. A loss beyond float32 is infinite: the service
    computes in no more.

    A loss whose advantages are the slopes and whose old log-probabilities are the present ones has
    the same gradient under ``importance_sampling``: its ratio is 1, so each token's term is
    slope · ∇log p. That is how one loss stands in for another.
    """
    import torch

    from spider_worker.distill.losses import policy_loss

    def joined(arrays: Sequence[NDArray[np.float32]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays).astype(np.float64))

    values = joined(logprobs).requires_grad_()
    total = policy_loss(
        loss.name,
        values,
        joined([datum.logprobs for datum in data]),
        joined([datum.advantages for datum in data]),
        torch.from_numpy(np.concatenate([datum.mask for datum in data])),
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
    )
    (gradient,) = torch.autograd.grad(total, values)
    value = float(total.detach())
    if abs(value) > float(np.finfo(np.float32).max):
        value = math.copysign(math.inf, value)
    with np.errstate(over="ignore"):  # of a loss that is not finite, which nobody trains on
        slopes = (-gradient).numpy().astype(np.float32)
    ends = np.cumsum([len(datum.tokens) for datum in data])
    return value, np.split(slopes, ends[:-1])
