"""What a trainer is, in the words of Tinker: ``forward_backward``, ``optim_step``, ``save_state``,
``load_state``, ``sampler``. A trainer holds the student: frozen base weights, a LoRA adapter and
the optimiser's moments.
"""

from __future__ import annotations

__all__ = [
    "AdamParams",
    "AdapterServer",
    "Datum",
    "DenseTargets",
    "ForwardBackward",
    "Loss",
    "Trainer",
    "TrainerInfo",
]

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from spider_worker.tokens import TokenEngine


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class DenseTargets:
    """The teacher's distribution, over the student's vocabulary, at some positions of a sequence.

    ``positions`` (P,) int64: row ``p`` is the distribution of the token at that index of
    ``Datum.tokens``. ``ids`` (P, K) int64 (-1: unused) and ``probs`` (P, K) float32 are its
    K entries; a row sums to at most 1, and what is missing to 1 is mass without a student token.
    ``objective``: ``cross_entropy`` is −Σ_k probs_k · log p(ids_k) (forward KL up to a constant;
    the missing mass is renormalised away by whoever makes the targets); ``jsd`` the generalised
    Jensen–Shannon divergence at β = ½ over the whole vocabulary, the missing mass one more event.
    ``weights`` (P,) float32 multiplies each position's term.
    """

    positions: NDArray[np.int64]
    ids: NDArray[np.int64]
    probs: NDArray[np.float32]
    weights: NDArray[np.float32]
    objective: Literal["cross_entropy", "jsd"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Datum:
    """One training sequence of N tokens, prompt and completion.

    ``logprobs`` (N,) float32 are those that the policy sampled with, ``advantages`` (N,) float32
    the weights of the policy gradient; both are 0 wherever ``mask`` (N,) bool is False, which is
    every token that the student did not sample. ``targets`` None: policy gradient alone. A
    position that has targets has advantage 0: one signal a token.
    """

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    advantages: NDArray[np.float32]
    mask: NDArray[np.bool_]
    targets: DenseTargets | None = None


@dataclasses.dataclass(frozen=True)
class Loss:
    """``name`` is ``importance_sampling``, ``ppo`` or ``cispo``; the clip bounds are of the ratio
    and ignored by the first."""

    name: str = "importance_sampling"
    clip_low: float = 0.8
    clip_high: float = 1.2


@dataclasses.dataclass(frozen=True)
class AdamParams:
    """Tinker's defaults. ``grad_clip_norm`` 0 does not clip."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip_norm: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class ForwardBackward:
    """``loss`` is a sum over all trained tokens (not a mean). ``logprobs`` holds, for each datum,
    (N,) float32: log p of each token under the weights that the gradient was taken at; only
    entries under the mask are meant. ``metrics`` is whatever else the trainer measured."""

    loss: float
    logprobs: Sequence[NDArray[np.float32]]
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TrainerInfo:
    """``tokenizer`` is what ``transformers`` loads the student's tokenizer from. ``dense`` are the
    objectives of DenseTargets that ``forward_backward`` takes. ``context`` None: unknown.
    ``sampler`` is what samples from the student: ``torch``, ``vllm`` or ``tinker``."""

    name: str
    base_model: str
    tokenizer: str
    lora_rank: int
    sampler: str
    dense: frozenset[str] = frozenset()
    context: int | None = None


class AdapterServer(Protocol):
    """An engine that samples from a base model under a LoRA adapter, which can be replaced.
    ``name`` is that of what samples."""

    name: str

    async def start(self) -> None: ...

    async def serve(self, adapter: Path) -> TokenEngine:
        """An engine over the PEFT adapter in that folder; the one given before is stale. The
        folder may be deleted afterwards."""

    async def close(self) -> None: ...


class Trainer(Protocol):
    """Contract of every trainer. All methods are called from one event loop, one at a time,
    ``sampler`` and the engine that it gives apart.

    Gradients add up over ``forward_backward`` calls until ``optim_step``. Errors: EngineUnavailable
    (the service or the device is gone), FatalJobError (a rank or model that is refused),
    AuthError; nothing else is expected of one that works.
    """

    @property
    def info(self) -> TrainerInfo: ...

    async def start(self) -> None:
        """Load the base model, make a fresh adapter (B = 0: the student is the base model)."""

    async def forward(self, data: Sequence[Datum]) -> list[NDArray[np.float32]]:
        """``logprobs`` as in ForwardBackward, without a gradient."""

    async def forward_backward(self, data: Sequence[Datum], loss: Loss) -> ForwardBackward: ...

    async def optim_step(self, adam: AdamParams) -> Mapping[str, float]:
        """One Adam step; returns what it measured (``grad_norm`` where known)."""

    async def sampler(self) -> TokenEngine:
        """An engine over the present weights, every later ``optim_step`` excluded until the next
        call: ask again after each step. Engines given before are stale. Not to be closed."""

    async def save_state(self, folder: Path) -> dict[str, Any]:
        """Everything that training goes on from: adapter, moments, step count. Writes files into
        the empty ``folder`` or leaves them with the service; the returned JSON and the files
        together are the state."""

    async def load_state(self, state: Mapping[str, Any], folder: Path) -> None:
        """The reverse. Raises FatalJobError for a state of another base model or rank."""

    async def load_weights(self, checkpoint: str) -> None:
        """Start from the adapter at ``checkpoint`` (a PEFT folder, a Hub name, ``tinker://…``)
        with fresh moments. Raises FatalJobError for one of another base model or rank."""

    async def save_adapter(self, folder: Path) -> None:
        """Write the adapter in PEFT's format (``adapter_config.json``,
        ``adapter_model.safetensors``) into the empty ``folder``."""

    async def close(self) -> None:
        """Free the device and connections. Idempotent."""
