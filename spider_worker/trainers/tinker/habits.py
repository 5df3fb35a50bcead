"""In what Tinker-compatible servers differ, found out before the first step."""

from __future__ import annotations

__all__ = ["REDUCTIONS", "Habits", "find_habits"]

import dataclasses
from typing import Any, Final

import numpy as np

from spider_worker.tinker_service.errors import Refusal
from spider_worker.tinker_service.service import HOSTED, TinkerService
from spider_worker.trainers.base import Datum, DenseTargets
from spider_worker.trainers.tinker.data import dense_datum

REDUCTIONS: Final = ("sum", "sequence_mean")

#: What SkyRL's server calls itself at its root.
_SKYRL: Final = "Tinker API Mock"


@dataclasses.dataclass(frozen=True)
class Habits:
    """``sequence_mean``: the gradient is that of the mean over sequences of each one's mean over
    its tokens, not of the sum over all tokens. ``adam_only``: options of an optimiser step beyond
    Adam's own, and of loading a state, are ignored. ``dense``: cross-entropy takes several
    targets a position."""

    sequence_mean: bool = False
    adam_only: bool = False
    dense: bool = False


async def find_habits(service: TinkerService, client: Any, reduction: str | None) -> Habits:
    """``client`` is the SDK's TrainingClient. ``reduction`` is one of ``REDUCTIONS``, None to go
    by what the server calls itself: what it does with a gradient cannot be seen from outside."""
    root = await service.get_json("/") if service.url != HOSTED else None
    skyrl = isinstance(root, dict) and root.get("name") == _SKYRL
    return Habits(
        sequence_mean=skyrl if reduction is None else reduction == "sequence_mean",
        adam_only=skyrl,
        dense=await _takes_dense(service, client),
    )


async def _takes_dense(service: TinkerService, client: Any) -> bool:
    """Whether two targets a position come back as two log-probabilities: some servers refuse
    them, some read a wrong number of positions and say nothing."""
    probe = Datum(
        tokens=np.array([0, 1, 0]),
        logprobs=np.zeros(3, np.float32),
        advantages=np.zeros(3, np.float32),
        mask=np.array([False, True, True]),
        targets=DenseTargets(
            positions=np.array([1]),
            ids=np.array([[1]]),
            probs=np.ones((1, 1), np.float32),
            weights=np.ones(1, np.float32),
            objective="cross_entropy",
        ),
    )
    data = [dense_datum(service.sdk, probe)]
    try:
        answer = await service.call(
            "asking for two targets a position", client, "forward", data, "cross_entropy"
        )
    except Refusal:
        return False
    (output,) = answer.loss_fn_outputs
    values = np.asarray(output["logprobs"].to_numpy(), np.float64)
    # Position 1 has the token 1 in both columns, so both must have its log-probability.
    return values.size == 4 and bool(np.isclose(values.flat[0], values.flat[1], rtol=1e-4))
