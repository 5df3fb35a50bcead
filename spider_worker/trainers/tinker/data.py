"""Training sequences on the wire. There position ``i`` of the input predicts token ``i + 1``, so
every array loses its first entry on the way out and gets it back on the way in."""

from __future__ import annotations

__all__ = ["dense_datum", "logprobs_of", "policy_datum", "scored_datum"]

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spider_sdk.errors import EngineUnavailable
from spider_worker.trainers.base import Datum


def scored_datum(sdk: Any, datum: Datum) -> Any:
    """For a pass whose loss means nothing."""
    return _datum(sdk, datum, target_tokens=datum.tokens[1:], weights=np.float32(datum.mask[1:]))


def policy_datum(
    sdk: Any, datum: Datum, logprobs: NDArray[np.float32], advantages: NDArray[np.float32]
) -> Any:
    """For the policy gradient; both arrays (N,)."""
    return _datum(
        sdk,
        datum,
        target_tokens=datum.tokens[1:],
        logprobs=np.float32(logprobs[1:]),
        advantages=np.float32(advantages[1:]),
    )


def dense_datum(sdk: Any, datum: Datum) -> Any:
    """For cross-entropy with the datum's targets, K a position. The token itself comes first, with
    weight 0, so that its log-probability is returned too."""
    targets = datum.targets
    assert targets is not None
    count, width = len(datum.tokens), targets.ids.shape[1] + 1
    ids = np.zeros((count, width), np.int64)
    weights = np.zeros((count, width), np.float32)
    ids[:, 0] = datum.tokens
    used = targets.ids >= 0
    ids[targets.positions, 1:] = np.where(used, targets.ids, 0)
    weights[targets.positions, 1:] = np.where(
        used, targets.probs * targets.weights[:, np.newaxis], 0.0
    )
    return _datum(sdk, datum, target_tokens=ids[1:], weights=weights[1:])


def logprobs_of(output: Any, datum: Datum, width: int = 1) -> NDArray[np.float32]:
    """(N, ``width``) from what the service returns for one sequence, row 0 being 0."""
    values = np.asarray(output["logprobs"].to_numpy(), np.float32)
    count = len(datum.tokens)
    if values.size != (count - 1) * width:
        raise EngineUnavailable(
            f"the Tinker service returned {values.size} log-probabilities for a sequence with"
            f" {(count - 1) * width} targets"
        )
    return np.concatenate([np.zeros((1, width), np.float32), values.reshape(count - 1, width)])


def _datum(sdk: Any, datum: Datum, **arrays: Any) -> Any:
    types = sdk.types
    return types.Datum(
        model_input=types.ModelInput.from_ints(datum.tokens[:-1].tolist()),
        loss_fn_inputs={
            name: types.TensorData.from_numpy(np.ascontiguousarray(values))
            for name, values in arrays.items()
        },
    )
