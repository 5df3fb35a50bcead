"""LoRA layers with the adapter in their weight: W + s·B·A in one product where PEFT makes three.

For inference a layer is exchanged for its base layer with that weight. For training it is
exchanged for a layer with a backward pass of its own: the gradients of A and B follow from the
output's gradient and the input, and nothing of the adapter's own outputs is ever made or kept.
"""

from __future__ import annotations

__all__ = ["MERGED_BYTES", "Exchange", "merge", "swapped"]

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch.nn import functional

MERGED_BYTES: Final = 4 << 30
"""Up to so many bytes of merged weights are kept beside the base's."""


class _Product(torch.autograd.Function):
    """y = x·Wᵀ + bias with W = W₀ + s·B·A already made, W₀ and the bias frozen.

    With g the gradient of y and N rows: dA = s·(g·B)ᵀ·x, dB = s·gᵀ·(x·Aᵀ), dx = g·W.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight, a, b)
        ctx.scale = scale
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight, a, b = ctx.saved_tensors
        (gradient,) = gradients
        rows = gradient.reshape(-1, gradient.shape[-1])
        x = inputs.reshape(-1, inputs.shape[-1])
        of_a = (rows @ b).mul_(ctx.scale).t() @ x
        of_b = rows.t() @ (x @ a.t()).mul_(ctx.scale)
        of_inputs = (rows @ weight).view(inputs.shape) if ctx.needs_input_grad[0] else None
        return of_inputs, None, None, of_a, of_b, None


class _Trained(torch.nn.Module):
    """Takes a LoRA layer's place in a training step."""

    def __init__(self, weight: torch.Tensor, layer: Any, name: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self._bias = layer.get_base_layer().bias
        # In a tuple: they stay the LoRA layer's parameters, and no module's but its.
        self._own = (layer.lora_A[name].weight, layer.lora_B[name].weight)
        self._scale = layer.scaling[name]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            inputs, self.weight, self._bias, *self._own, self._scale
        )
        return made


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """A LoRA layer, its place, and its merged weight."""

    parent: Any
    place: str
    layer: Any
    trained: _Trained

    def serve(self) -> None:
        # The parameter is exchanged and not its data: it may be tied to another module's.
        base = self.layer.get_base_layer()
        base.weight = self.trained.weight
        self.parent._modules[self.place] = base

    def train(self) -> None:
        self.parent._modules[self.place] = self.trained

    def undo(self, weight: torch.nn.Parameter) -> None:
        """``weight`` is the base layer's own."""
        self.parent._modules[self.place] = self.layer
        self.layer.get_base_layer().weight = weight


@torch.no_grad()
def merge(module: torch.nn.Module, name: str) -> list[Exchange]:
    """What can be exchanged in ``module`` for the adapter ``name``; nothing unless all can: in
    another type than float32 a merged weight would lose most of a small change, layers of other
    kinds have no single product, and there may be too many bytes."""
    found = []
    size = 0
    for parent in module.modules():
        children: Any = parent.named_children()
        for place, layer in children:
            if name in getattr(layer, "lora_embedding_A", ()):
                return []
            if name not in getattr(layer, "lora_A", ()):
                continue
            base = layer.get_base_layer()
            if not isinstance(base, torch.nn.Linear) or base.weight.dtype != torch.float32:
                return []
            size += base.weight.numel() * base.weight.element_size()
            if size > MERGED_BYTES:
                return []
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            weight = torch.addmm(base.weight, b, a, alpha=layer.scaling[name])
            found.append(Exchange(parent, place, layer, _Trained(weight, layer, name)))
    return found


@contextlib.contextmanager
def swapped(exchanges: Sequence[Exchange], *, train: bool) -> Iterator[None]:
    """The layers exchanged, for training or for inference. The base's own tensors are put back
    afterwards, not computed back."""
    weights = [exchange.layer.get_base_layer().weight for exchange in exchanges]
    try:
        for exchange in exchanges:
            exchange.train() if train else exchange.serve()
        yield
    finally:
        for exchange, weight in zip(reversed(exchanges), reversed(weights), strict=True):
            exchange.undo(weight)
