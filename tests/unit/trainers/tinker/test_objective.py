"""A loss as a function of log-probabilities, and one loss that stands in for another."""

from __future__ import annotations

import numpy as np
import pytest

from spider_worker.trainers.base import Loss
from spider_worker.trainers.tinker.objective import evaluate
from tests.support.training import datum

DATA = [
    datum((5, 9), (8, 17, 44), (-1.0, -2.0, -3.0), (1.0, -0.5, 0.25)),
    datum((3,), (7, 6), (-0.5, -4.0), (-2.0, 1.5)),
]
NOW = [
    np.float32([-9.0, -9.0, -1.1, -1.5, -3.9]),
    np.float32([-9.0, -0.4, -3.0]),
]
LOSSES = [Loss("importance_sampling"), Loss("ppo"), Loss("cispo"), Loss("cispo", 0.5, 3.0)]


def by_hand(loss: Loss, now: list[np.ndarray]) -> float:
    total = 0.0
    for one, values in zip(DATA, now, strict=True):
        for old, new, advantage in zip(
            one.logprobs[one.mask], values[one.mask], one.advantages[one.mask], strict=True
        ):
            ratio = np.exp(np.float64(new) - old)
            clipped = min(max(ratio, loss.clip_low), loss.clip_high)
            total -= {
                "importance_sampling": ratio * advantage,
                "ppo": min(ratio * advantage, clipped * advantage),
                "cispo": clipped * advantage * new,
            }[loss.name]
    return float(total)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_value_is_the_formulas(loss: Loss) -> None:
    assert evaluate(loss, DATA, NOW)[0] == pytest.approx(by_hand(loss, NOW), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES[:2], ids=str)
def test_slopes_are_finite_differences(loss: Loss) -> None:
    _, slopes = evaluate(loss, DATA, NOW)
    for number, one in enumerate(DATA):
        for at in range(len(one.tokens)):
            moved = []
            for step in (1e-3, -1e-3):
                now = [values.astype(np.float64) for values in NOW]
                now[number][at] += step
                moved.append(by_hand(loss, now))
            slope = -(moved[0] - moved[1]) / 2e-3
            assert slopes[number][at] == pytest.approx(slope, rel=1e-3, abs=1e-4)
            assert one.mask[at] or slopes[number][at] == 0.0


def test_cispos_ratio_has_no_slope_of_its_own() -> None:
    loss = LOSSES[-1]
    _, slopes = evaluate(loss, DATA, NOW)
    for one, values, slope in zip(DATA, NOW, slopes, strict=True):
        ratio = np.exp(values - one.logprobs).clip(loss.clip_low, loss.clip_high)
        np.testing.assert_allclose(slope[one.mask], (ratio * one.advantages)[one.mask], rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_importance_sampling_stands_in_for_every_loss(loss: Loss) -> None:
    _, slopes = evaluate(loss, DATA, NOW)
    standing_in = [
        datum(
            tuple(one.tokens[~one.mask]),
            tuple(one.tokens[one.mask]),
            values[one.mask].tolist(),
            slope[one.mask].tolist(),
        )
        for one, values, slope in zip(DATA, NOW, slopes, strict=True)
    ]
    _, again = evaluate(Loss("importance_sampling"), standing_in, NOW)
    for one, other in zip(slopes, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_what_is_beyond_float32_is_infinite() -> None:
    far = [datum((5, 9), (8,), (-200.0,), 1.0)]
    value, _ = evaluate(Loss(), far, [np.float32([0.0, 0.0, -1.0])])
    assert value == -np.inf
