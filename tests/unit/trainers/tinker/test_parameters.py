"""What a job may say of training at Tinker."""

from __future__ import annotations

from typing import Any

import pytest

from spider_sdk.errors import NotSupported
from spider_worker.trainers.tinker import TRAINER_PARAMETERS, TinkerTrainer, check_parameters

URL = "http://127.0.0.1:9"


def test_what_is_known_passes() -> None:
    given = {
        "tokenizer": "org/tokenizer",
        "revision": "main",
        "trust_remote_code": False,
        "train_attn": True,
        "train_mlp": False,
        "train_unembed": True,
        "loss_reduction": "sequence_mean",
        "patience": 10,
    }
    assert set(given) == set(TRAINER_PARAMETERS)
    check_parameters(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"patiense": 1}, r"model\.parameters\.patiense: .*did you mean 'patience'"),
        ({"device": "cuda"}, "has no such option"),
        ({"train_mlp": "yes"}, "train_mlp: expected true or false"),
        ({"tokenizer": 3}, "tokenizer: expected a text"),
        ({"loss_reduction": "mean"}, "sum or sequence_mean"),
        ({"patience": 0}, "a number above 0"),
        ({"patience": True}, "a number above 0"),
    ],
)
def test_what_is_not_is_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(NotSupported, match=said):
        TinkerTrainer("m", lora_rank=4, base_url=URL, parameters=given)


def test_a_rank_counts_from_one() -> None:
    with pytest.raises(NotSupported, match="lora_rank"):
        TinkerTrainer("m", lora_rank=0, base_url=URL)
