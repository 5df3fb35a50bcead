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
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    used = ids >= 0
    chosen = torch.where(used, logprobs.gather(1, ids.clamp(min=0)), -torch.inf)
    student = chosen.exp()
    teacher = torch.where(used, probs, 0.0)
    student = torch.cat([student, (1 - student.sum(dim=1, keepdim=True)).clamp(min=0)], dim=1)
    teacher = torch.cat([teacher, (1 - teacher.sum(dim=1, keepdim=True)).clamp(min=0)], dim=1)
    mixed = beta * teacher + (1 - beta) * student
    parts = beta * _relative(teacher, mixed) + (1 - beta) * _relative(student, mixed)
    return (weights * parts.sum(dim=1)).sum()


def _relative(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """one · log(one/other), 0 where ``one`` is 0, with a gradient that is finite there."""
    tiny = torch.finfo(one.dtype).tiny
    return one * (one.clamp(min=tiny).log() - other.clamp(min=tiny).log())
