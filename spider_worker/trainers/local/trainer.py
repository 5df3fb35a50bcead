"""LocalTrainer: the student under torch and peft, on the CPU or one GPU."""

from __future__ import annotations

__all__ = ["TRAINER_PARAMETERS", "LocalTrainer", "check_parameters"]

import asyncio
import concurrent.futures
import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from spider_sdk.errors import (
    EngineUnavailable,
    FatalJobError,
    NotSupported,
    PipelineError,
    SpiderError,
)
from spider_worker.tokens import TokenEngine, TokenEngineInfo
from spider_worker.torch_models import parameters as model_parameters
from spider_worker.trainers.base import (
    AdamParams,
    AdapterServer,
    Datum,
    ForwardBackward,
    Loss,
    TrainerInfo,
)

if TYPE_CHECKING:
    import torch

    from spider_worker.torch_models.causal import CausalModel
    from spider_worker.trainers.local.adapter import Adapter

T = TypeVar("T")

TRAINER_PARAMETERS: Final = {
    **model_parameters.MODEL_PARAMETERS,
    "lora_alpha": "the adapter is scaled by lora_alpha / lora_rank (default: 32)",
    "target_modules": "modules with an adapter, as for PEFT (default: all-linear)",
    "micro_batch_tokens": "tokens, padding included, of one backward pass (default: 16384)",
    "gradient_checkpointing": "compute layers twice to save memory (default: false)",
}
"""What ``model.parameters`` may hold for this trainer, and what each means."""

_LOSSES: Final = ("importance_sampling", "ppo", "cispo")


def check_parameters(parameters: Mapping[str, Any], *, where: str = "model.parameters") -> None:
    """Raises NotSupported for a parameter that is unknown or malformed."""
    model_parameters.check_parameters(
        parameters, TRAINER_PARAMETERS, what="the local trainer", where=where
    )
    model_parameters.check_whole(parameters, "micro_batch_tokens", where=where)
    alpha = parameters.get("lora_alpha", 32)
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or alpha <= 0:
        raise NotSupported(f"{where}.lora_alpha: expected a number above 0, not {alpha!r}.")
    targets = parameters.get("target_modules", "all-linear")
    listed = isinstance(targets, (list, tuple)) and all(isinstance(t, str) for t in targets)
    if not targets or not (isinstance(targets, str) or listed):
        raise NotSupported(
            f"{where}.target_modules: expected a text or a list of texts, not {targets!r}."
        )
    if not isinstance(parameters.get("gradient_checkpointing", False), bool):
        raise NotSupported(f"{where}.gradient_checkpointing: expected true or false.")


class LocalTrainer:
    """Trainer over the model ``model`` (a folder or a Hub name).

    ``seed`` makes the fresh adapter (None: a random one). ``server`` samples in the place of
    this process's own sampler; the trainer starts and closes it. ``checkpoint`` is loaded by
    ``start`` as by ``load_weights``. Everything that blocks runs on one thread, in order.

    Gradients that wait for an ``optim_step`` are no part of a state. Fatal is also a gradient
    that is not finite, at ``optim_step``: weights and moments stay as they were.
    """

    def __init__(
        self,
        model: str,
        *,
        lora_rank: int,
        parameters: Mapping[str, Any] | None = None,
        seed: int | None = None,
        server: AdapterServer | None = None,
        checkpoint: str | None = None,
    ) -> None:
        self._parameters = dict(parameters or {})
        check_parameters(self._parameters)
        if lora_rank < 1:
            raise NotSupported(f"lora_rank: expected a whole number from 1, not {lora_rank!r}.")
        self._name, self._rank, self._seed = model, lora_rank, seed
        self._server, self._checkpoint = server, checkpoint
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None
        self._model: CausalModel | None = None
        self._adapter: Adapter | None = None
        self._optimiser: torch.optim.Adam | None = None
        self._steps = 0
        self._version = 0  # of the weights; an engine over another is stale
        self._engine: TokenEngine | None = None

    @property
    def info(self) -> TrainerInfo:
        return TrainerInfo(
            name="local",
            base_model=self._name,
            tokenizer=self._name,
            lora_rank=self._rank,
            sampler="torch" if self._server is None else self._server.name,
            dense=frozenset({"cross_entropy", "jsd"}),
            context=self._model.context if self._model is not None else None,
        )

    async def start(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "local-trainer")
        if self._server is not None:
            # First: it takes its share of a GPU by what is free.
            await self._server.start()
        await self._run(self._load)
        if self._checkpoint is not None:
            await self.load_weights(self._checkpoint)

    async def forward(self, data: Sequence[Datum]) -> list[NDArray[np.float32]]:
        from spider_worker.trainers.local import step

        model, adapter = self._started()

        def forward() -> list[NDArray[np.float32]]:
            with adapter.merged():
                return step.logprobs(model, data, batch_tokens=self._micro_batch_tokens)

        return await self._run(forward)

    async def forward_backward(self, data: Sequence[Datum], loss: Loss) -> ForwardBackward:
        from spider_worker.trainers.local import step

        if loss.name not in _LOSSES:
            raise NotSupported(
                f"loss_fn: {loss.name!r} is not known; use one of {', '.join(_LOSSES)}."
            )
        model, adapter = self._started()

        def both() -> ForwardBackward:
            with adapter.trained():
                return step.forward_backward(
                    model,
                    data,
                    loss,
                    batch_tokens=self._micro_batch_tokens,
                    checkpointing=self._parameters.get("gradient_checkpointing", False),
                )

        return await self._run(both)

    async def optim_step(self, adam: AdamParams) -> Mapping[str, float]:
        self._started()
        return await self._run(lambda: self._step(adam))

    async def sampler(self) -> TokenEngine:
        if self._engine is None:
            if self._server is not None:
                self._engine = await self._serve(self._server)
            else:
                self._engine = self._own_engine()
        return self._engine

    async def save_state(self, folder: Path) -> dict[str, Any]:
        from spider_worker.trainers.local.state import write_state

        _, adapter = self._started()
        optimiser = self._optimiser
        assert optimiser is not None
        await self._run(lambda: write_state(folder, adapter, optimiser))
        return {**self._identity(), "step": self._steps}

    async def load_state(self, state: Mapping[str, Any], folder: Path) -> None:
        from spider_worker.trainers.local.state import check_state

        self._started()
        check_state(state, self._identity())
        await self._run(lambda: self._restore(state, folder))

    async def load_weights(self, checkpoint: str) -> None:
        _, adapter = self._started()

        def load() -> None:
            adapter.read(checkpoint)
            self._reset()

        await self._run(load)

    async def save_adapter(self, folder: Path) -> None:
        _, adapter = self._started()
        await self._run(lambda: adapter.write(folder))

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._new_version()
        try:
            if self._server is not None:
                await self._server.close()
        finally:
            # What is queued runs, finds its sampler stale and says so.
            await asyncio.to_thread(thread.shutdown)
            self._model = self._adapter = self._optimiser = None
            gc.collect()
            import torch

            torch.cuda.empty_cache()  # nothing on the CPU

    @property
    def _micro_batch_tokens(self) -> int:
        return int(self._parameters.get("micro_batch_tokens", 16384))

    def _started(self) -> tuple[CausalModel, Adapter]:
        if self._model is None or self._adapter is None:
            raise PipelineError("The local trainer was used before start or after close.")
        return self._model, self._adapter

    async def _run(self, function: Callable[[], T]) -> T:
        """On the trainer's thread, with what torch raises mapped to Spider's errors."""
        if self._thread is None:
            raise PipelineError("The local trainer was used before start or after close.")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, _mapped, function)

    def _identity(self) -> dict[str, Any]:
        from spider_worker.trainers.local.state import FORMAT

        _, adapter = self._started()
        return {
            "trainer": "local",
            "format": FORMAT,
            "base_model": self._name,
            "lora_rank": self._rank,
            "lora_alpha": adapter.alpha,
            "target_modules": list(adapter.targets),
        }

    async def _serve(self, server: AdapterServer) -> TokenEngine:
        _, adapter = self._started()
        with tempfile.TemporaryDirectory(prefix="spider-adapter-") as name:
            folder = Path(name)
            await self._run(lambda: adapter.write(folder))
            return await server.serve(folder)

    def _own_engine(self) -> TokenEngine:
        from spider_worker.torch_models.serving import ModelEngine

        model, adapter = self._started()
        thread, version = self._thread, self._version
        assert thread is not None

        @contextlib.contextmanager
        def lease() -> Iterator[CausalModel]:
            if self._version != version:
                raise PipelineError(
                    "This sampler is stale: the weights have changed since. Ask the trainer for "
                    "its sampler after each step."
                )
            with adapter.merged():
                yield model

        return ModelEngine(
            lease,
            thread,
            info=TokenEngineInfo(self._name, model.vocabulary, model.context),
            vocabulary=model.vocabulary,
            parameters=self._parameters,
        )

    # What follows runs on the trainer's thread.

    def _load(self) -> None:
        from spider_worker.torch_models.causal import load_model
        from spider_worker.trainers.local.adapter import Adapter

        model = load_model(self._name, self._parameters, where="model.parameters")
        self._adapter = Adapter(
            model,
            rank=self._rank,
            alpha=float(self._parameters.get("lora_alpha", 32)),
            targets=self._parameters.get("target_modules", "all-linear"),
            seed=self._seed,
        )
        self._model = model
        self._reset()

    def _reset(self) -> None:
        """Fresh moments, after the weights were set."""
        import torch

        _, adapter = self._started()
        # One kernel over all weights; the learning rate comes with each step.
        self._optimiser = torch.optim.Adam(list(adapter.weights.values()), lr=0.0, fused=True)
        self._optimiser.zero_grad()
        self._steps = 0
        self._new_version()

    def _new_version(self) -> None:
        self._version += 1
        self._engine = None
        if self._adapter is not None:
            self._adapter.changed()

    def _step(self, adam: AdamParams) -> dict[str, float]:
        import torch

        _, adapter = self._started()
        optimiser = self._optimiser
        assert optimiser is not None
        weights = list(adapter.weights.values())
        for weight in weights:
            if weight.grad is None:  # nothing was trained: the moments move on alone
                weight.grad = torch.zeros_like(weight)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not bool(torch.isfinite(norm)):
            optimiser.zero_grad()
            raise FatalJobError(
                f"The gradient of step {self._steps + 1} is not finite; the step was not taken. "
                "Lower learning_rate, or use dtype float32."
            )
        if adam.grad_clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(weights, adam.grad_clip_norm, norm)
        for group in optimiser.param_groups:
            group.update(lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps)
        optimiser.step()
        optimiser.zero_grad()
        self._steps += 1
        self._new_version()
        return {"grad_norm": float(norm)}

    def _restore(self, state: Mapping[str, Any], folder: Path) -> None:
        from spider_worker.trainers.local.state import read_state

        _, adapter = self._started()
        weights, moments = read_state(folder)
        adapter.load(weights, f"The state in {folder}")
        self._reset()
        assert self._optimiser is not None
        for name, values in moments.items():
            weight = adapter.weights[name]
            self._optimiser.state[weight] = {
                moment: value.to(weight.device) for moment, value in values.items()
            }
        self._steps = int(state["step"])


def _mapped(function: Callable[[], T]) -> T:
    import torch

    try:
        return function()
    except SpiderError:
        raise
    except torch.OutOfMemoryError as error:
        raise EngineUnavailable(
            f"The device's memory is too small for this training step: {error}. Lower "
            "model.parameters.micro_batch_tokens, or set gradient_checkpointing."
        ) from error
