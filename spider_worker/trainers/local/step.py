"""The forward and backward pass over a list of data.

Logits exist at trained positions alone, and of those for one chunk at a time: the loss is a
sum over positions, so each chunk goes back to the hidden states by itself and the backbone is
gone through once, with what has gathered there.
"""

from __future__ import annotations

__all__ = ["forward_backward", "logprobs"]

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spider_sdk.errors import FatalJobError
from spider_worker.distill import losses
from spider_worker.torch_models.causal import CausalModel
from spider_worker.torch_models.scoring import chunks, micro_batches, preceding
from spider_worker.trainers.base import Datum, ForwardBackward, Loss


def forward_backward(
    model: CausalModel,
    data: Sequence[Datum],
    loss: Loss,
    *,
    batch_tokens: int,
    checkpointing: bool = False,
) -> ForwardBackward:
    """Adds to the gradients of whatever in ``model`` requires one. ``checkpointing`` computes
    each layer a second time instead of keeping what is inside."""
    outputs = [np.zeros(len(datum.tokens), np.float32) for datum in data]
    total = 0.0
    trained = 0
    cut = _cut(model, data, batch_tokens)
    with _checkpointed(model) if checkpointing else contextlib.nullcontext():
        for batch in cut:
            # A layer whose inside is computed again keeps no keys for others to see.
            hidden = preceding(model, batch.sequences, batch.positions, share=not checkpointing)
            leaf = hidden.detach().requires_grad_()
            values = torch.empty(len(batch), dtype=torch.float32)
            for part in chunks(len(batch), model.vocabulary):
                term, values[part] = _chunk(model, leaf[part], batch, part, loss)
                torch.autograd.backward(term)
                total += float(term.detach())
            # Without a gradient where the head alone has an adapter.
            if hidden.requires_grad and leaf.grad is not None:
                torch.autograd.backward(hidden, leaf.grad)
            batch.place(values.numpy(), outputs)
            trained += len(batch)
    return ForwardBackward(
        total, outputs, {"trained_tokens": float(trained), "micro_batches": float(len(cut))}
    )


@torch.no_grad()
def logprobs(
    model: CausalModel, data: Sequence[Datum], *, batch_tokens: int
) -> list[NDArray[np.float32]]:
    """As ForwardBackward's, without a gradient."""
    outputs = [np.zeros(len(datum.tokens), np.float32) for datum in data]
    for batch in _cut(model, data, batch_tokens):
        hidden = preceding(model, batch.sequences, batch.positions)
        values = torch.empty(len(batch), dtype=torch.float32)
        for part in chunks(len(batch), model.vocabulary):
            values[part] = _gather(model.logits(hidden[part]), batch.tokens[part])
        batch.place(values.numpy(), outputs)
    return outputs


def _chunk(
    model: CausalModel, hidden: torch.Tensor, batch: _Batch, part: slice, loss: Loss
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of all loss terms at the positions ``part`` of ``batch``, and log p there."""
    logits = model.logits(hidden)
    values = _gather(logits, batch.tokens[part])
    term = losses.policy_loss(
        loss.name,
        values,
        batch.old[part],
        batch.advantages[part],
        batch.mask[part],
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
    )
    for dense in batch.dense:
        here = dense.within(part)
        if here.start < here.stop:
            objective = losses.jsd if dense.objective == "jsd" else losses.cross_entropy
            rows = logits[dense.rows[here] - part.start]
            term = term + objective(rows, dense.ids[here], dense.probs[here], dense.weights[here])
    return term, values.detach().cpu()


def _gather(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return -torch.nn.functional.cross_entropy(logits, tokens, reduction="none")


@dataclasses.dataclass(frozen=True, eq=False)
class _Dense:
    """Targets of one objective in a batch; ``rows`` (R,) are indices of its positions, ascending,
    and ``places`` the same for Python."""

    objective: str
    places: NDArray[np.int64]
    rows: torch.Tensor
    ids: torch.Tensor  # (R, K)
    probs: torch.Tensor  # (R, K)
    weights: torch.Tensor  # (R,)

    def within(self, part: slice) -> slice:
        """Which of them are of the positions ``part``."""
        first, last = np.searchsorted(self.places, (part.start, part.stop))
        return slice(int(first), int(last))


class _Batch:
    """The trained positions of some data, one after the other: P of them. Tensors are (P,)."""

    def __init__(self, data: Sequence[Datum], numbers: Sequence[int], device: torch.device) -> None:
        self._numbers = numbers
        chosen = [data[number] for number in numbers]
        self.positions = [_trained(datum) for datum in chosen]
        self.sequences = [datum.tokens for datum in chosen]

        def flat(name: str) -> torch.Tensor:
            arrays = [
                getattr(datum, name)[at] for datum, at in zip(chosen, self.positions, strict=True)
            ]
            return torch.from_numpy(np.concatenate(arrays)).to(device)

        self.tokens, self.old, self.advantages, self.mask = map(
            flat, ("tokens", "logprobs", "advantages", "mask")
        )
        self.dense = list(_dense(chosen, self.positions, device))

    def __len__(self) -> int:
        return len(self.tokens)

    def place(self, values: NDArray[np.float32], outputs: list[NDArray[np.float32]]) -> None:
        """Put ``values`` (P,) where they belong in ``outputs``, which has an array a datum."""
        start = 0
        for number, at in zip(self._numbers, self.positions, strict=True):
            outputs[number][at] = values[start : start + len(at)]
            start += len(at)


def _trained(datum: Datum) -> NDArray[np.int64]:
    at = np.flatnonzero(datum.mask)
    if datum.targets is not None and len(datum.targets.positions):
        at = np.union1d(at, datum.targets.positions)
    return at.astype(np.int64)


def _cut(model: CausalModel, data: Sequence[Datum], budget: int) -> list[_Batch]:
    """Micro-batches of the data that have anything to train. Raises FatalJobError for a datum
    that the model cannot take."""
    useful = []
    for number, datum in enumerate(data):
        at = _trained(datum)
        if not len(at):
            continue
        if at[0] < 1 or at[-1] >= len(datum.tokens):
            raise FatalJobError(
                f"Datum {number} trains position {at[0] if at[0] < 1 else at[-1]} of "
                f"{len(datum.tokens)} tokens; positions count from 1, since nothing precedes 0."
            )
        if len(datum.tokens) > model.context:
            raise FatalJobError(
                f"Datum {number} has {len(datum.tokens)} tokens, and the context of "
                f"{model.name!r} is {model.context}. Lower max_tokens, or shorten the prompts."
            )
        if datum.tokens.min() < 0 or datum.tokens.max() >= model.vocabulary:
            raise FatalJobError(f"Datum {number} has a token that {model.name!r} does not know.")
        useful.append(number)
    lengths = [len(data[number].tokens) for number in useful]
    return [
        _Batch(data, [useful[index] for index in batch], model.device)
        for batch in micro_batches(lengths, budget)
    ]


def _dense(
    data: Sequence[Datum], positions: Sequence[NDArray[np.int64]], device: torch.device
) -> Iterator[_Dense]:
    starts = np.cumsum([0, *(len(at) for at in positions)])
    found: dict[str, list[tuple[NDArray[np.int64], Datum]]] = {}
    for datum, at, start in zip(data, positions, starts, strict=False):
        if datum.targets is not None and len(datum.targets.positions):
            rows = start + np.searchsorted(at, datum.targets.positions)
            found.setdefault(datum.targets.objective, []).append((rows, datum))
    for objective, parts in sorted(found.items()):
        targets = [datum.targets for _, datum in parts if datum.targets is not None]
        widest = max(target.ids.shape[1] for target in targets)
        arrays = (
            [rows for rows, _ in parts],
            [_widened(target.ids, widest, -1) for target in targets],
            [_widened(target.probs, widest, 0) for target in targets],
            [target.weights for target in targets],
        )
        joined: list[NDArray[Any]] = [np.concatenate(array) for array in arrays]
        if (np.diff(joined[0]) < 0).any():
            order = np.argsort(joined[0], kind="stable")
            joined = [one[order] for one in joined]
        yield _Dense(objective, joined[0], *(torch.from_numpy(one).to(device) for one in joined))


def _widened(table: NDArray[Any], width: int, filling: int) -> NDArray[Any]:
    spare = width - table.shape[1]
    return np.pad(table, ((0, 0), (0, spare)), constant_values=filling) if spare else table


@contextlib.contextmanager
def _checkpointed(model: CausalModel) -> Iterator[None]:
    """Layers compute their inside again on the way back. They do so in training mode alone,
    which is set for them and not for what is in them: no dropout of the base's is woken."""
    module = model.module
    module.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [layer for layer in module.modules() if getattr(layer, "gradient_checkpointing", None)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        module.gradient_checkpointing_disable()
