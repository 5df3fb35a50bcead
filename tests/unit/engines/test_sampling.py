"""Sampling rows with parameters of their own: distributions, filters, penalties, ends."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch

from spider_worker.engines.sampling import RowParams, RowSampler, RowStopper, row_params

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])
DRAWS = 4000


def _draw(params: RowParams, logits: torch.Tensor = LOGITS, draws: int = DRAWS) -> list[float]:
    """Shares of each token over many rows of one call."""
    prompts = torch.zeros((draws, 1), dtype=torch.long)
    sampler = RowSampler([params] * draws, prompts, torch.ones_like(prompts))
    tokens = sampler(prompts, logits.repeat(draws, 1)).argmax(dim=1).tolist()
    counts = collections.Counter(tokens)
    return [counts[token] / draws for token in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(dim=0).tolist()
    # Five standard deviations of a share over so many draws.
    assert _draw(RowParams(temperature=temperature)) == pytest.approx(expected, abs=0.04)


def test_temperature_zero_takes_the_best() -> None:
    assert _draw(RowParams(temperature=0), draws=50) == [1, 0, 0, 0]


def test_top_k_top_p_and_min_p_cut_the_tail() -> None:
    two = LOGITS[:2].softmax(dim=0).tolist()
    for params in (RowParams(top_k=2), RowParams(top_p=0.8), RowParams(min_p=0.3)):
        assert _draw(params) == pytest.approx([*two, 0, 0], abs=0.04)
    assert _draw(RowParams(top_p=1e-6), draws=50) == [1, 0, 0, 0]


def test_rows_of_a_batch_keep_their_own_parameters() -> None:
    rows = [RowParams(temperature=0), RowParams(top_k=1), RowParams(temperature=50.0)]
    prompts = torch.zeros((3, 1), dtype=torch.long)
    seen: list[set[int]] = [set(), set(), set()]
    sampler = RowSampler(rows, prompts, torch.ones_like(prompts))
    for _ in range(100):
        for row, token in enumerate(sampler(prompts, LOGITS.repeat(3, 1)).argmax(1).tolist()):
            seen[row].add(token)
    assert seen[:2] == [{0}, {0}]
    assert len(seen[2]) > 1


def test_a_seeded_row_does_not_depend_on_its_neighbours() -> None:
    def tokens(rows: list[RowParams], at: int) -> list[int]:
        prompts = torch.zeros((len(rows), 1), dtype=torch.long)
        sampler = RowSampler(rows, prompts, torch.ones_like(prompts))
        logits = LOGITS.repeat(len(rows), 1)
        return [int(sampler(prompts, logits).argmax(1)[at]) for _ in range(20)]

    seeded, free = RowParams(seed=5), RowParams()
    alone = tokens([seeded], 0)
    assert tokens([free, free, seeded], 2) == alone
    assert tokens([RowParams(seed=6)], 0) != alone
    assert tokens([RowParams(seed=-1)], 0)  # any whole number will do


def test_penalties_count_what_was_said_and_no_padding() -> None:
    prompts = torch.tensor([[0, 0, 2]])
    present = torch.tensor([[0, 0, 1]])
    said = torch.cat([prompts, torch.tensor([[1, 1]])], dim=1)

    def scores(**penalty: Any) -> list[float]:
        sampler = RowSampler([RowParams(temperature=0, **penalty)], prompts, present)
        return sampler(said, torch.tensor([[2.0, 2.0, -2.0, 2.0]]))[0].tolist()

    assert scores(repetition_penalty=2.0) == [2, 1, -4, 2]  # prompt and completion
    assert scores(presence_penalty=1.0) == [2, 1, -2, 2]  # the completion alone
    assert scores(frequency_penalty=0.5) == [2, 1, -2, 2]


def test_each_row_ends_by_its_own_rules() -> None:
    letters = "0abcdefg"
    stopper = RowStopper(
        [9, 2, 9, 9],
        [(), (), ("bc",), ()],
        prompt_length=1,
        end_tokens=frozenset({0}),
        decode=lambda tokens: "".join(letters[t] for t in tokens),
        gone=lambda row: row == 3,
    )
    ids = torch.zeros((4, 1), dtype=torch.long)
    for column in ([1, 1, 1, 1], [0, 2, 2, 2], [3, 3, 3, 3]):
        ids = torch.cat([ids, torch.tensor(column).unsqueeze(1)], dim=1)
        done = stopper(ids, None)
    assert done.tolist() == [True, True, True, True]
    assert stopper.reasons == ["stop", "length", "stop", "abort"]
    assert stopper.ends == [2, 2, 3, 1]


def test_the_models_own_defaults_give_way_to_the_users() -> None:
    params = row_params(
        {"temperature": 0.1, "max_new_tokens": 3}, {"temperature": 0.6, "top_k": 20}
    )
    assert (params.temperature, params.top_k, params.max_tokens) == (0.1, 20, 3)
    assert row_params({"stop": "a"}, {}).stop == ("a",)
    assert row_params({"top_k": -1}, {}).top_k == 0
