"""What sequences begin with alike is run once, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spider_worker.torch_models.causal import CausalModel, load_model
from spider_worker.torch_models.prefixes import gather
from spider_worker.torch_models.scoring import preceding
from tests.unit.torch_models.test_models import make

DEVICE = torch.device("cpu")


def sequences() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Two prompts of several lengths, four samples of the one, three of the other; a sample whose
    first places are not wanted, one with a single place, and one that has no prompt."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(1, 64, 20), draw.integers(1, 64, 13)]
    whole = [
        np.concatenate([prompts[number // 4], draw.integers(1, 64, 5 + number % 3)])
        for number in range(7)
    ]
    places = [np.arange(len(prompts[number // 4]), len(one)) for number, one in enumerate(whole)]
    places[2] = places[2][1:]
    places[3] = places[3][-1:]
    whole.append(draw.integers(1, 64, 6))
    places.append(np.arange(1, 6))
    return whole, places


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Gemma2", "Mistral", "GPT2"])
@pytest.mark.parametrize("inference", [True, False])
def test_hidden_states_are_the_same(tmp_path: Path, family: str, inference: bool) -> None:
    model = load_model(str(make(tmp_path, family)), {}, where="model.parameters")
    whole, places = sequences()
    with torch.inference_mode(inference):
        shared = preceding(model, whole, places)
        apart = preceding(model, whole, places, share=False)
    torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-4)
    for row, (tokens, at) in enumerate(zip(whole, places, strict=True)):
        alone = preceding(model, [tokens], [at], share=False)
        start = sum(len(one) for one in places[:row])
        torch.testing.assert_close(shared[start : start + len(at)], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_gradients_are_the_same(tmp_path: Path, family: str) -> None:
    model = load_model(str(make(tmp_path, family)), {}, where="model.parameters")
    whole, places = sequences()
    found: list[list[torch.Tensor]] = []
    for share in (True, False):
        for weight in model.module.parameters():
            weight.requires_grad_(True)
            weight.grad = None
        torch.autograd.backward(torch.sin(preceding(model, whole, places, share=share)).sum())
        grads = [weight.grad for weight in model.module.parameters()]
        found.append([grad for grad in grads if grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "less"), [("Llama", True), ("Mistral", False)])
def test_a_prompt_is_run_once(
    tmp_path: Path, family: str, less: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But where a model has a sliding window, for which a mask of our own would not do."""
    model = load_model(str(make(tmp_path, family)), {}, where="model.parameters")
    whole, places = sequences()
    seen: list[int] = []
    hidden = CausalModel.hidden

    def counted(self: CausalModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(ids.numel())
        return hidden(self, ids, **options)

    monkeypatch.setattr(CausalModel, "hidden", counted)
    preceding(model, whole, places)
    assert (sum(seen) < 0.85 * 8 * max(map(len, whole))) is less


def test_a_pass_of_its_own_is_taken_where_it_saves_something() -> None:
    rows = [np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]), np.array([1, 2, 3, 6])]
    batch = gather(rows, [3, 3, 3], DEVICE)
    assert batch is not None
    assert batch.prefixes.tolist() == [[1, 2, 3]]
    assert batch.ids.tolist() == [[4], [5], [6]]
    assert batch.positions.tolist() == [[3], [3], [3]]
    assert gather([row + number for number, row in enumerate(rows)], [3, 3, 3], DEVICE) is None
    assert gather(rows, [0, 0, 0], DEVICE) is None


def test_what_a_token_sees() -> None:
    rows = [np.array([1, 2, 3, 7, 8]), np.array([1, 2, 3, 7, 9]), np.array([4, 7]), np.array([4])]
    batch = gather(rows, [3, 3, 1, 0], DEVICE)
    assert batch is not None
    seen = batch.seen()[:, 0].int().tolist()
    assert seen[0] == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert seen[2] == [[1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]
    assert seen[3] == [[0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
