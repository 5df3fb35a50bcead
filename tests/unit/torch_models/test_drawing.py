"""Drawing tokens: the right distribution, the right log-probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spider_worker.tokens import SampleParams
from spider_worker.torch_models.drawing import draw, uniforms

LOGITS = torch.tensor([2.0, -torch.inf, 1.0, 0.5, -3.0])


def frequencies(params: SampleParams, count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """How often each token came at evenly spread numbers, and the exp of its log-probability."""
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, logprobs = draw(LOGITS.expand(count, -1), numbers, params)
    said = np.zeros(5)
    said[tokens] = logprobs.exp()
    return np.bincount(tokens, minlength=5) / count, said


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SampleParams(1), [0, 2, 3, 4]),
        (SampleParams(1, temperature=0.5), [0, 2, 3, 4]),
        (SampleParams(1, top_k=2), [0, 2]),
        (SampleParams(1, top_p=0.7), [0, 2]),  # p(0) is 0.60
        (SampleParams(1, top_p=0.55), [0]),
        (SampleParams(1, top_k=3, top_p=0.85), [0, 2]),  # of the three, 0 and 2 are 0.86
        (SampleParams(1, top_p=0.0), [0]),
    ],
)
def test_tokens_come_as_often_as_their_logprobs_say(params: SampleParams, kept: list[int]) -> None:
    often, said = frequencies(params)
    want = torch.full((5,), -torch.inf)
    want[kept] = LOGITS[kept] / params.temperature
    np.testing.assert_allclose(often, want.softmax(0), atol=1e-3)
    came = often > 0
    np.testing.assert_allclose(said[came], want.softmax(0)[came], atol=1e-6)


def test_temperature_0_takes_the_best_at_the_models_own_logprob() -> None:
    tokens, logprobs = draw(
        LOGITS[None], torch.tensor([0.99], dtype=torch.float64), SampleParams(1, temperature=0)
    )
    assert tokens.tolist() == [0]
    assert logprobs.item() == pytest.approx(LOGITS.log_softmax(0)[0].item())


def test_the_ends_of_the_interval_draw_possible_tokens() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    numbers = torch.tensor([0.0, np.nextafter(1, 0)], dtype=torch.float64)
    assert draw(logits, numbers, SampleParams(1))[0].tolist() == [1, 2]


def test_numbers_follow_from_prompt_seed_and_sample() -> None:
    first = uniforms((1, 2), 5, 0, 8)
    np.testing.assert_array_equal(first, uniforms([1, 2], 5, 0, 8))
    np.testing.assert_array_equal(first[:3], uniforms((1, 2), 5, 0, 3))
    others = [
        uniforms((1, 3), 5, 0, 8),
        uniforms((1, 2), 6, 0, 8),
        uniforms((1, 2), 5, 1, 8),
        uniforms((1, 2), None, 0, 8),
        uniforms((1, 2), None, 0, 8),
    ]
    assert len({array.tobytes() for array in (first, *others)}) == 6
