"""TinkerTrainer: the student at a service, which holds its weights and the optimiser's moments."""

from __future__ import annotations

__all__ = ["TinkerTrainer"]

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spider_sdk.errors import EngineUnavailable, FatalJobError, NotSupported, PipelineError
from spider_worker.tinker_service.errors import Refusal
from spider_worker.tinker_service.sampling import ServiceSampler
from spider_worker.tinker_service.service import TinkerService
from spider_worker.tokens import TokenEngine, TokenEngineInfo
from spider_worker.trainers.base import AdamParams, Datum, ForwardBackward, Loss, TrainerInfo
from spider_worker.trainers.tinker.checkpoints import Checkpoints
from spider_worker.trainers.tinker.habits import Habits, find_habits
from spider_worker.trainers.tinker.parameters import check_parameters
from spider_worker.trainers.tinker.passes import LOSSES, Passes

log = logging.getLogger(__name__)


class TinkerTrainer:
    """Trainer over the base model ``model`` of a Tinker-compatible service, which is the one at
    ``base_url`` (see TinkerService). ``seed`` makes the fresh adapter (None: a random one).

    A state is a path at the service, which keeps it. Gradients that wait for an ``optim_step`` are
    no part of one. A loss that is not finite has spoilt the gradient that waits, and the service
    has no call that clears it: ``optim_step`` raises FatalJobError from then on, and weights and
    moments stay as they were.
    """

    def __init__(
        self,
        model: str,
        *,
        lora_rank: int,
        seed: int | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        allow_private: bool = True,
    ) -> None:
        self._parameters = dict(parameters or {})
        check_parameters(self._parameters)
        if lora_rank < 1:
            raise NotSupported(f"lora_rank: expected a whole number from 1, not {lora_rank!r}.")
        self._name, self._rank, self._seed = model, lora_rank, seed
        self._service = TinkerService(
            base_url=base_url,
            api_key=api_key,
            allow_private=allow_private,
            patience=float(self._parameters.get("patience", 120)),
        )
        self._client: Any = None  # the SDK's TrainingClient
        self._passes: Passes | None = None
        self._checkpoints: Checkpoints | None = None
        self._habits = Habits()
        self._context: int | None = None
        self._tokenizer = str(self._parameters.get("tokenizer", model))
        self._steps = 0
        self._version = 0  # of the weights; an engine over another is stale
        self._engine: TokenEngine | None = None
        self._waiting = False  # a gradient waits for a step
        self._spoilt: float | None = None  # the loss that was not finite

    @property
    def info(self) -> TrainerInfo:
        """Before ``start``, without the context and what the service takes."""
        return TrainerInfo(
            name="tinker",
            base_model=self._name,
            tokenizer=self._tokenizer,
            lora_rank=self._rank,
            sampler="tinker",
            dense=frozenset({"cross_entropy"} if self._habits.dense else ()),
            context=self._context,
        )

    async def start(self) -> None:
        service = self._service
        await service.start()
        self._context = service.context_of(self._name)
        client = self._client = await self._make_adapter()
        info = await service.call("asking for the adapter", client, "get_info")
        if info.lora_rank not in (None, self._rank):
            raise FatalJobError(
                f"{service.name} made an adapter of rank {info.lora_rank}, not {self._rank}"
            )
        named = info.model_data.tokenizer_id or info.model_data.model_name
        self._tokenizer = str(self._parameters.get("tokenizer") or named or self._name)
        reduction = self._parameters.get("loss_reduction")
        self._habits = await find_habits(service, client, reduction)
        self._passes = Passes(service, client, self._habits)
        self._checkpoints = Checkpoints(service, client, self._name, self._rank, self._renew)

    async def forward(self, data: Sequence[Datum]) -> list[NDArray[np.float32]]:
        passes, _ = self._started()
        return await passes.forward(data)

    async def forward_backward(self, data: Sequence[Datum], loss: Loss) -> ForwardBackward:
        if loss.name not in LOSSES:
            raise NotSupported(
                f"loss_fn: {loss.name!r} is not known; use one of {', '.join(LOSSES)}."
            )
        passes, _ = self._started()
        self._waiting = True
        result = await passes.forward_backward(data, loss)
        if not math.isfinite(result.loss):
            self._spoilt = result.loss
        return result

    async def optim_step(self, adam: AdamParams) -> Mapping[str, float]:
        passes, _ = self._started()
        if self._spoilt is not None:
            raise FatalJobError(
                f"The loss of step {self._steps + 1} is {self._spoilt}, so its gradient is not"
                " finite; the step was not taken. Lower learning_rate, or set advantage_clip."
            )
        if adam.grad_clip_norm > 0 and self._habits.adam_only:
            raise NotSupported(
                f"grad_clip_norm: {self._service.name} does not clip gradients; leave it at 0"
            )
        params = self._service.sdk.types.AdamParams(
            learning_rate=adam.learning_rate,
            beta1=adam.beta1,
            beta2=adam.beta2,
            eps=adam.eps,
            weight_decay=0.0,
            grad_clip_norm=adam.grad_clip_norm,
        )
        answer = await self._service.call("an optimiser step", self._client, "optim_step", params)
        passes.stepped()
        self._waiting = False
        self._steps += 1
        self._new_version()
        return {f"tinker/{name}": float(value) for name, value in (answer.metrics or {}).items()}

    async def sampler(self) -> TokenEngine:
        self._started()
        if self._engine is None:
            version = self._version
            client = await self._service.call(
                "refreshing the sampler", self._client, "save_weights_and_get_sampling_client"
            )

            def fresh() -> None:
                if self._version != version:
                    raise PipelineError(
                        "This sampler is stale: the weights have changed since. Ask the trainer"
                        " for its sampler after each step."
                    )

            info = TokenEngineInfo(self._name, context=self._context)
            self._engine = ServiceSampler(self._service, client, info, fresh=fresh)
        return self._engine

    async def save_state(self, folder: Path) -> dict[str, Any]:  # noqa: ARG002 (the service's)
        """Leaves ``folder`` empty."""
        _, checkpoints = self._started()
        return await checkpoints.save(self._steps)

    async def load_state(self, state: Mapping[str, Any], folder: Path) -> None:  # noqa: ARG002
        _, checkpoints = self._started()
        self._steps = await checkpoints.restore(state)
        self._new_version()

    async def load_weights(self, checkpoint: str) -> None:
        """``checkpoint`` is a ``tinker://`` path to training weights: the service starts from no
        other. A server that knows no other way brings the moments along, and is warned of."""
        _, checkpoints = self._started()
        await checkpoints.start_from(checkpoint)
        if self._habits.adam_only:
            log.warning(
                "%s loads a checkpoint with its optimiser's moments; this run begins with those",
                self._service.name,
            )
        self._steps = 0
        self._new_version()

    async def save_adapter(self, folder: Path) -> None:
        _, checkpoints = self._started()
        await checkpoints.export(folder, self._steps)

    async def close(self) -> None:
        client, self._client = self._client, None
        self._passes = self._checkpoints = None
        self._new_version()
        if client is not None and await self._service.answers():
            await self._unload(client)
        await self._service.close()

    def _started(self) -> tuple[Passes, Checkpoints]:
        if self._passes is None or self._checkpoints is None:
            raise PipelineError("The tinker trainer was used before start or after close.")
        return self._passes, self._checkpoints

    def _new_version(self) -> None:
        self._version += 1
        self._engine = None

    async def _renew(self) -> Any:
        """A fresh adapter in place of the one there is."""
        await self._unload(self._client)
        self._client = await self._make_adapter()
        self._passes = Passes(self._service, self._client, self._habits)
        self._waiting, self._spoilt = False, None
        self._new_version()  # whether or not something is loaded into it
        return self._client

    async def _make_adapter(self) -> Any:
        trained = {
            name: self._parameters[name]
            for name in ("train_attn", "train_mlp", "train_unembed")
            if name in self._parameters
        }
        seed = None
        if self._seed is not None:  # 31 bits, which every server takes
            digest = hashlib.blake2b(str(self._seed).encode(), digest_size=4).digest()
            seed = int.from_bytes(digest, "big") >> 1
        try:
            return await self._service.call(
                "making an adapter",
                self._service.client,
                "create_lora_training_client",
                base_model=self._name,
                rank=self._rank,
                seed=seed,
                **trained,
            )
        except Refusal as error:
            said = (
                f"{self._service.name} makes no adapter of rank {self._rank} on {self._name!r}:"
                f" {error.detail}"
            )
            if "rank" in error.detail.lower():
                raise FatalJobError(f"{said}. Set lora_rank to one that it takes") from error
            raise EngineUnavailable(f"{said}. Try again when it has room") from error

    async def _unload(self, client: Any) -> None:
        """Free the adapter's place, which a server would keep until the session has long ended."""
        try:
            if self._waiting:
                # Some give a gradient that waits to whoever gets the place next.
                nothing = self._service.sdk.types.AdamParams(learning_rate=0.0)
                await self._service.call("clearing a gradient", client, "optim_step", nothing)
            body = {"model_id": client.model_id, "type": "unload_model"}
            status = await self._service.post("/api/v1/unload_model", body)
            log.debug("unloading the adapter: status %d", status)
        except PipelineError as error:
            # The service may be what ended the run.
            log.info("the adapter was left with the service: %s", error.message)
