"""The forward and the backward pass at the service."""

from __future__ import annotations

__all__ = ["LOSSES", "Passes"]

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from spider_sdk.errors import EngineUnavailable, NotSupported
from spider_worker.tinker_service.errors import Refusal, ResultLost
from spider_worker.tinker_service.service import TinkerService
from spider_worker.trainers.base import Datum, ForwardBackward, Loss
from spider_worker.trainers.tinker import data as wire
from spider_worker.trainers.tinker.habits import Habits
from spider_worker.trainers.tinker.objective import evaluate

LOSSES: Final = ("importance_sampling", "ppo", "cispo")

#: The bounds that the service clips to where it is told none.
_BOUNDS: Final = (0.8, 1.2)

Logprobs = list[NDArray[np.float32]]


class Passes:
    """``client`` is the SDK's TrainingClient. A loss that the service does not have, or not with
    these clip bounds, is computed here from a forward pass and sent as ``importance_sampling`` with
    the same gradient (see ``objective``)."""

    def __init__(self, service: TinkerService, client: Any, habits: Habits) -> None:
        self._service, self._client, self._habits = service, client, habits
        self._missing: set[str] = set()  # losses that the service turned out not to have
        self._scale: int | None = None

    def stepped(self) -> None:
        """After each optimiser step."""
        self._scale = None

    async def forward(self, data: Sequence[Datum]) -> Logprobs:
        """(N,) for each datum."""
        if not data:
            return []
        sent = [wire.scored_datum(self._service.sdk, datum) for datum in data]
        answer = await self._service.call(
            "a forward pass", self._client, "forward", sent, "cross_entropy"
        )
        return _read(answer, data)

    async def forward_backward(self, data: Sequence[Datum], loss: Loss) -> ForwardBackward:
        """As the trainer's. What has targets and a policy gradient is sent for both."""
        dense = [number for number, datum in enumerate(data) if _has_targets(datum)]
        policy = [
            number
            for number, datum in enumerate(data)
            if not _has_targets(datum) or datum.advantages[datum.mask].any()
        ]
        if self._scale is None:
            self._scale = len(dense) + len(policy)
        first, second = await asyncio.gather(
            self._policy([data[number] for number in policy], loss),
            self._dense([data[number] for number in dense]),
        )
        logprobs: Logprobs = [np.zeros(0, np.float32)] * len(data)
        for numbers, part in ((policy, first), (dense, second)):
            for number, values in zip(numbers, part.logprobs, strict=True):
                logprobs[number] = values
        trained = float(sum(int(datum.mask.sum()) for datum in data))
        metrics = {**first.metrics, **second.metrics, "trained_tokens": trained}
        return ForwardBackward(first.loss + second.loss, logprobs, metrics)

    async def _policy(self, data: Sequence[Datum], loss: Loss) -> ForwardBackward:
        if not data:
            return ForwardBackward(0.0, [])
        if not all(map(_finite, data)):
            return await self._value(data, loss)
        try:
            return await self._trained(data, loss)
        except ResultLost:
            # Of a loss that is no finite number there may be no word.
            result = await self._value(data, loss)
            if math.isfinite(result.loss):
                raise
            return result

    async def _value(self, data: Sequence[Datum], loss: Loss) -> ForwardBackward:
        """Without a gradient."""
        logprobs = await self.forward(data)
        return ForwardBackward(evaluate(loss, data, logprobs)[0], logprobs)

    async def _trained(self, data: Sequence[Datum], loss: Loss) -> ForwardBackward:
        if loss.name not in self._missing and self._offers(loss):
            try:
                return await self._native(data, loss)
            except Refusal as error:
                if loss.name == "importance_sampling" or error.status not in (400, 422):
                    raise
        result = await self._standing_in(data, loss)
        self._missing.add(loss.name)  # and what was refused was the loss, and not the data
        return result

    def _offers(self, loss: Loss) -> bool:
        """Bounds of one's own are not read by every server."""
        if loss.name == "importance_sampling" or not self._habits.adam_only:
            return True
        return (loss.clip_low, loss.clip_high) == _BOUNDS

    async def _native(self, data: Sequence[Datum], loss: Loss) -> ForwardBackward:
        config: dict[str, float] | None = None
        if loss.name != "importance_sampling" and (loss.clip_low, loss.clip_high) != _BOUNDS:
            config = {"clip_low_threshold": loss.clip_low, "clip_high_threshold": loss.clip_high}
        sent = [
            wire.policy_datum(
                self._service.sdk, datum, datum.logprobs, self._weighed(datum, datum.advantages)
            )
            for datum in data
        ]
        answer = await self._backward(sent, loss.name, config)
        logprobs = _read(answer, data)
        total, _ = evaluate(loss, data, logprobs)
        return ForwardBackward(total, logprobs, _metrics(answer))

    async def _standing_in(self, data: Sequence[Datum], loss: Loss) -> ForwardBackward:
        logprobs = await self.forward(data)
        total, slopes = evaluate(loss, data, logprobs)
        if not math.isfinite(total):
            return ForwardBackward(total, logprobs)
        sent = [
            wire.policy_datum(self._service.sdk, datum, now, self._weighed(datum, slope))
            for datum, now, slope in zip(data, logprobs, slopes, strict=True)
        ]
        answer = await self._backward(sent, "importance_sampling", None)
        return ForwardBackward(total, logprobs, _metrics(answer))

    async def _dense(self, data: Sequence[Datum]) -> ForwardBackward:
        if not data:
            return ForwardBackward(0.0, [])
        if not self._habits.dense or any(
            datum.targets is not None and datum.targets.objective != "cross_entropy"
            for datum in data
        ):
            raise NotSupported(
                f"{self._service.name} does not train on these targets; use signal: sampled"
            )
        sent = [wire.dense_datum(self._service.sdk, datum) for datum in data]
        answer = await self._backward(sent, "cross_entropy", None)
        total, logprobs = 0.0, []
        for output, datum in zip(_outputs(answer, data), data, strict=True):
            targets = datum.targets
            assert targets is not None
            values = wire.logprobs_of(output, datum, targets.ids.shape[1] + 1)
            weights = np.where(targets.ids >= 0, targets.probs, 0.0).astype(np.float64)
            weights *= targets.weights[:, np.newaxis]
            total -= float((weights * values[targets.positions, 1:]).sum())
            logprobs.append(values[:, 0])
        return ForwardBackward(total, logprobs, _metrics(answer))

    async def _backward(
        self, sent: Sequence[Any], loss_fn: str, config: Mapping[str, float] | None
    ) -> Any:
        return await self._service.call(
            "a training step", self._client, "forward_backward", list(sent), loss_fn, config
        )

    def _weighed(self, datum: Datum, advantages: NDArray[np.float32]) -> NDArray[np.float32]:
        """Advantages whose loss is a sum over all tokens, for a server that takes means. The number
        of sequences up to the next step is that of the first pass; further passes change the
        gradient's length by it, not its direction, and Adam does not see a length that stays."""
        if not self._habits.sequence_mean:
            return advantages
        return advantages * np.float32((len(datum.tokens) - 1) * (self._scale or 1))


def _has_targets(datum: Datum) -> bool:
    return datum.targets is not None and len(datum.targets.positions) > 0


def _finite(datum: Datum) -> bool:
    """What is not finite cannot be sent."""
    return all(np.isfinite(values).all() for values in (datum.logprobs, datum.advantages))


def _outputs(answer: Any, data: Sequence[Datum]) -> Sequence[Any]:
    found: Sequence[Any] = answer.loss_fn_outputs
    if len(found) != len(data):
        raise EngineUnavailable(
            f"the Tinker service returned {len(found)} results for {len(data)} sequences"
        )
    return found


def _read(answer: Any, data: Sequence[Datum]) -> Logprobs:
    return [
        wire.logprobs_of(output, datum)[:, 0]
        for output, datum in zip(_outputs(answer, data), data, strict=True)
    ]


def _metrics(answer: Any) -> dict[str, float]:
    return {f"tinker/{name}": float(value) for name, value in (answer.metrics or {}).items()}
