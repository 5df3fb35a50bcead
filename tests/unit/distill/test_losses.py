"""Losses against formulas written by hand, and their gradients against autograd on those."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from spider_sdk.errors import NotSupported
from spider_worker.distill.losses import cross_entropy, jsd, policy_loss

NEW = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.0], dtype=torch.float64)
OLD = torch.tensor([-1.5, -1.0, -0.5, -3.5, -9.0], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5, -1.0, 4.0], dtype=torch.float64)
MASK = torch.tensor([True, True, True, True, False])


def gradient(
    function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor
) -> tuple[float, torch.Tensor]:
    point = at.clone().requires_grad_()
    value = function(point)
    (found,) = torch.autograd.grad(value, point)
    return float(value.detach()), found


def by_hand(name: str, new: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for place in range(4):  # the fifth is masked
        ratio = torch.exp(new[place] - OLD[place])
        advantage = ADVANTAGES[place]
        clipped = torch.clamp(ratio, 0.8, 1.2)
        if name == "importance_sampling":
            total = total - ratio * advantage
        elif name == "ppo":
            total = total - torch.min(ratio * advantage, clipped * advantage)
        else:
            total = total - clipped.detach() * advantage * new[place]
    return total


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo"])
def test_a_policy_loss_is_its_formula(name: str) -> None:
    value, slope = gradient(lambda new: policy_loss(name, new, OLD, ADVANTAGES, MASK), NEW)
    want, its_slope = gradient(lambda new: by_hand(name, new), NEW)
    assert value == pytest.approx(want)
    torch.testing.assert_close(slope, its_slope)
    assert slope[4] == 0


def test_what_the_losses_keep_of_a_gradient() -> None:
    """Where the ratio is beyond the clip and the advantage would take it further, ppo is silent;
    cispo goes on, at the clip's weight."""
    new, old = torch.tensor([-1.0]), torch.tensor([-2.0])  # e times as likely as it was
    one = torch.ones(1)
    mask = torch.ones(1, dtype=torch.bool)
    slopes = {
        name: gradient(lambda at, name=name: policy_loss(name, at, old, one, mask), new)[1].item()
        for name in ("importance_sampling", "ppo", "cispo")
    }
    assert slopes["importance_sampling"] == pytest.approx(-2.718281828)
    assert slopes["ppo"] == 0
    assert slopes["cispo"] == pytest.approx(-1.2)


def test_what_stands_outside_the_mask_does_not_matter() -> None:
    wild = torch.tensor([-1.0, float("nan"), float("-inf"), 1e30])
    mask = torch.tensor([True, False, False, False])
    value, slope = gradient(
        lambda at: policy_loss("ppo", at, torch.tensor([-1.0, 0, 0, 0]), torch.ones(4), mask), wild
    )
    assert value == pytest.approx(-1.0)
    assert slope.tolist() == [-1.0, 0.0, 0.0, 0.0]


def test_a_loss_that_is_not_known_is_refused() -> None:
    with pytest.raises(NotSupported, match="'dpo'"):
        policy_loss("dpo", NEW, OLD, ADVANTAGES, MASK)


LOGITS = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 0.0, 1.0, -1.0], [2.0, 2.0, -3.0, 0.0]])
IDS = torch.tensor([[3, 0, -1], [2, -1, -1], [1, 0, 2]])
PROBS = torch.tensor([[0.7, 0.3, 0.0], [0.6, 0.0, 0.0], [0.5, 0.2, 0.1]])
WEIGHTS = torch.tensor([1.0, 0.5, 2.0])


def test_cross_entropy_is_its_sum() -> None:
    def by_hand(logits: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for p in range(3):
            logprobs = logits[p] - torch.logsumexp(logits[p], 0)
            for k in range(3):
                if IDS[p, k] >= 0:
                    total = total - WEIGHTS[p] * PROBS[p, k] * logprobs[IDS[p, k]]
        return total

    value, slope = gradient(lambda logits: cross_entropy(logits, IDS, PROBS, WEIGHTS), LOGITS)
    want, its_slope = gradient(by_hand, LOGITS)
    assert value == pytest.approx(want)
    torch.testing.assert_close(slope, its_slope)


@pytest.mark.parametrize("beta", [0.5, 0.1])
def test_jsd_is_that_of_the_targets_and_one_event_more(beta: float) -> None:
    def by_hand(logits: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for p in range(3):
            student = torch.softmax(logits[p], 0)
            used = [int(token) for token in IDS[p] if token >= 0]
            ours = [student[token] for token in used]
            theirs = [PROBS[p, k] for k in range(3) if IDS[p, k] >= 0]
            ours.append(1 - sum(ours))
            theirs.append(1 - sum(theirs))
            for one, other in zip(ours, theirs, strict=True):
                mixed = beta * other + (1 - beta) * one
                if other > 0:
                    total = total + WEIGHTS[p] * beta * other * torch.log(other / mixed)
                total = total + WEIGHTS[p] * (1 - beta) * one * torch.log(one / mixed)
        return total

    value, slope = gradient(lambda logits: jsd(logits, IDS, PROBS, WEIGHTS, beta=beta), LOGITS)
    want, its_slope = gradient(by_hand, LOGITS)
    assert value == pytest.approx(want, rel=1e-5)
    torch.testing.assert_close(slope, its_slope, rtol=1e-4, atol=1e-6)


def test_jsd_is_0_where_both_are_the_same_and_nowhere_else() -> None:
    student = torch.softmax(LOGITS, dim=1)
    ids = torch.arange(4).expand(3, 4)
    value, slope = gradient(lambda logits: jsd(logits, ids, student, WEIGHTS), LOGITS)
    assert value == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-5, rtol=0)
    assert jsd(LOGITS, ids, student.flip(1), WEIGHTS) > 0.1


def test_a_rest_that_agrees_pulls_nowhere() -> None:
    """Two targets of the student's own probability: the lump is the student's, too."""
    student = torch.softmax(LOGITS, dim=1)
    ids = torch.tensor([[0, 1], [0, 1], [0, 1]])
    _, slope = gradient(lambda logits: jsd(logits, ids, student[:, :2], WEIGHTS), LOGITS)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", [cross_entropy, jsd])
def test_certainty_has_a_gradient(loss: Callable[..., torch.Tensor]) -> None:
    """Probabilities of 0 on either side, and a student that is all but certain."""
    logits = torch.tensor([[200.0, 0.0, -200.0]])
    ids = torch.tensor([[1, 0, -1]])
    probs = torch.tensor([[1.0, 0.0, 0.0]])
    value, slope = gradient(lambda at: loss(at, ids, probs, torch.ones(1)), logits)
    assert value > 0
    assert torch.isfinite(slope).all()
