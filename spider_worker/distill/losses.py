"""The losses of a training step, in torch. All are sums over tokens, never means: a long
completion counts for as much as its tokens do, and a batch may be cut anywhere.
"""

from __future__ import annotations

__all__ = ["cross_entropy", "jsd", "policy_loss"]

import torch

from spider_sdk.errors import NotSupported


def policy_loss(
    name: str,
    logprobs: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float = 0.8,
    clip_high: float = 1.2,
) -> torch.Tensor:
    """The policy gradient's loss; all tensors (N,). ``logprobs`` are those of the policy that is
    trained, ``old`` those that were sampled with, r = exp(logprobs − old).

    ``importance_sampling``: −Σ r·A. ``ppo``: −Σ min(r·A, clip(r)·A). ``cispo``: −Σ
    stopgrad(clip(r))·A·logprobs (MiniMax-M1, arXiv 2506.13585), which keeps every token's
    gradient. Clips are to [``clip_low``, ``clip_high``]. Raises NotSupported for another name.
    """
    # Tokens outside the mask are taken out first: exp of what stands there must make no NaN.
    logprobs, old, advantages = logprobs[mask], old[mask], advantages[mask]
    ratio = torch.exp(logprobs - old)
    clipped = ratio.clamp(clip_low, clip_high)
    match name:
        case "importance_sampling":
            terms = ratio * advantages
        case "ppo":
            terms = torch.minimum(ratio * advantages, clipped * advantages)
        case "cispo":
            terms = clipped.detach() * advantages * logprobs
        case _:
            raise NotSupported(f"loss_fn {name!r} is not known")
    return -terms.sum()


def cross_entropy(
    logits: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """−Σ_p w_p Σ_k probs_pk · log p(ids_pk): forward KL but for the teacher's entropy.

    ``logits`` (P, V), ``ids`` (P, K) with −1 unused, ``probs`` (P, K), ``weights`` (P,).
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, ids.clamp(min=0))
    terms = torch.where(ids >= 0, probs * chosen, 0.0)
    return -(weights * terms.sum(dim=1)).sum()


def jsd(
    logits: torch.Tensor,
    ids: torch.Tensor,
    probs: torch.Tensor,
    weights: torch.Tensor,
    *,
    beta: float = 0.5,
) -> torch.Tensor:
    """Σ_p w_p · JSD_β(q_p ‖ p_p), the generalised Jensen–Shannon divergence
    β·KL(q ‖ m) + (1−β)·KL(p ‖ m) with m = β·q + (1−β)·p (arXiv 2306.13649, eq. 1).

    q is ``probs`` over ``ids``, shapes as in ``cross_entropy``; everything else is one more event
    in both, so that no mass is lost whatever K is.
    """
    chosen = torch.log_softmax(logits.float(), dim=-1).gather(1, ids.clamp(min=0))
    used = ids >= 0
    if not bool(used.all()):
        chosen = torch.where(used, chosen, -torch.inf)
        probs = torch.where(used, probs, 0.0)
    student = chosen.exp()
    # β·q·log q + (1−β)·p·log p − m·log m is the same, and takes one logarithm less of each.
    parts = _gap(student, probs, beta).sum(dim=1)
    rest = [(1 - one.sum(dim=1)).clamp(min=0) for one in (student, probs)]
    return (weights * (parts + _gap(rest[0], rest[1], beta))).sum()


def _gap(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    mixed = torch.lerp(student, teacher, beta)
    return beta * _xlogx(teacher) + (1 - beta) * _xlogx(student) - _xlogx(mixed)


def _xlogx(values: torch.Tensor) -> torch.Tensor:
    """x·log x, 0 where x is 0, with a gradient that is finite there."""
    return values * values.clamp(min=torch.finfo(values.dtype).tiny).log()
