"""The common family of decoder layers, in as few calls as they take.

For a small model most of a decoding step is what ``transformers`` does around the arithmetic:
masks, caches that are copied, norms in six calls, a product for each projection. Here the weights
are laid out anew, so that a layer takes four products and about twenty calls in all:

- projections of one input stand in one matrix;
- a norm's weight is in the matrix behind it, and what is left of the norm is x/√(Σx² + Hε), with √H
  in that matrix too;
- the rows of queries and keys are in such an order that the two numbers of a rotation are
  neighbours, and a rotary embedding is one complex product; attention sees the same products of
  queries and keys in any order of their entries;
- the queries' scale is in their rows.

``is_lean`` says for which models that is the same.
"""

from __future__ import annotations

__all__ = ["LEAN_BYTES", "LeanModel"]

import dataclasses
import math
from typing import Any, Final

import torch
from torch.nn import functional

from spider_worker.torch_models.prefixes import Batch

LEAN_BYTES: Final = 2 << 30
"""Up to so many bytes of weights are laid out anew: in a larger model the arithmetic is what takes
the time."""

_PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """One layer; matrices are (out, in). ``qk_scale`` (heads, d) is None where queries and keys
    have no norm."""

    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    qk_scale: torch.Tensor | None
    qk_eps: torch.Tensor
    out: torch.Tensor
    out_bias: torch.Tensor | None
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


class LeanModel:
    """The layers of ``module``, a ``transformers`` model whose projections are plain linear layers,
    as they are now. H is the width of the hidden state, d that of a head; there are Q heads of
    queries for K heads of keys and values."""

    def __init__(self, module: Any) -> None:
        backbone = module.base_model
        attention = backbone.layers[0].self_attn
        self.size = int(attention.head_dim)
        self.query_heads = attention.q_proj.weight.shape[0] // self.size
        self.heads = attention.k_proj.weight.shape[0] // self.size
        self._embed = backbone.embed_tokens
        self._rotary = backbone.rotary_emb
        width = int(self._embed.weight.shape[1])
        norm = backbone.norm
        # √H·√(mean + ε) = √(Σx² + Hε): see ``_normed``.
        self._eps = self._constant(math.sqrt(width * norm.variance_epsilon))
        self._last = norm.weight.detach() * math.sqrt(width)
        self.layers = [self._layer(layer, width) for layer in backbone.layers]

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether ``module``, of the family, can be laid out as it is: with plain layers and not
        too large."""
        backbone = module.base_model
        size = 0
        for layer in backbone.layers:
            for name in _PROJECTIONS:
                part = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
                projection = getattr(part, name)
                if type(projection) is not torch.nn.Linear:
                    return False
                size += projection.weight.numel() * projection.weight.element_size()
        return type(backbone.embed_tokens) is torch.nn.Embedding and size <= LEAN_BYTES

    def hidden(
        self,
        ids: torch.Tensor,
        wanted: torch.Tensor,
        kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """(P, H): of ``ids`` (B, T), rows padded on the right, the hidden states at the places
        ``wanted`` (P,), row·T + column. ``kept`` takes each layer's keys and values, both
        (B, T, K, d)."""
        rotations = self.rotations(ids.shape[1]).repeat(ids.shape[0], 1)
        return self._run(ids, rotations, wanted, kept=kept)

    def following(self, batch: Batch, wanted: torch.Tensor) -> torch.Tensor:
        """(P, H): the hidden states of what follows the prefixes of ``batch``, at the places
        ``wanted`` (P,), row·T + column."""
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.hidden(batch.prefixes, wanted[:0], kept)
        rotations = self.rotations(batch.width + batch.ids.shape[1])[batch.positions.reshape(-1)]
        before = [(keys[batch.which], values[batch.which]) for keys, values in kept]
        return self._run(batch.ids, rotations, wanted, before=before, seen=batch.seen())

    def _run(
        self,
        ids: torch.Tensor,
        rotations: torch.Tensor,
        wanted: torch.Tensor,
        *,
        kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
        before: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``rotations`` (B·T, d/2) are the tokens'; ``before`` are each layer's keys and values of
        what stands before them, ``seen`` is a mask, None for a causal one."""
        shape = ids.shape
        hidden = self.embed(ids.reshape(-1))
        for number, layer in enumerate(self.layers):
            turned, values = self.project(layer, hidden, rotations)
            turned = turned.view(*shape, *turned.shape[1:])
            values = values.reshape(*shape, *values.shape[1:])
            queries, keys = turned[:, :, : self.query_heads], turned[:, :, self.query_heads :]
            if kept is not None:
                kept.append((keys, values))
            if before is not None:
                keys = torch.cat([before[number][0], keys], dim=1)
                values = torch.cat([before[number][1], values], dim=1)
            attended = functional.scaled_dot_product_attention(
                queries.transpose(1, 2),
                keys.transpose(1, 2),
                values.transpose(1, 2),
                attn_mask=seen,
                is_causal=seen is None,
                scale=1.0,
                enable_gqa=True,
            )
            attended = attended.transpose(1, 2).reshape(len(hidden), -1)
            if layer is self.layers[-1]:
                hidden, attended = hidden[wanted], attended[wanted]
            hidden = self.finish(layer, hidden, attended)
        return self.last(hidden)

    # -- the parts of a forward pass ------------------------------------------------

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(N,) to (N, H)."""
        hidden: torch.Tensor = functional.embedding(ids, self._embed.weight)
        return hidden

    def rotations(self, count: int) -> torch.Tensor:
        """(count, d/2) complex, for the positions from 0 on."""
        every = torch.arange(count, device=self._last.device).unsqueeze(0)
        cos, sin = self._rotary(self._last, every)
        half = self.size // 2
        return torch.complex(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())

    def project(
        self, layer: _Layer, hidden: torch.Tensor, rotations: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From (N, H): queries and keys (N, Q + K, d), turned by ``rotations`` (N, d/2); values
        (N, K, d)."""
        made = functional.linear(_normed(hidden, self._eps), layer.qkv, layer.qkv_bias)
        count, split = len(made), (self.query_heads + self.heads) * self.size
        turned = made[:, :split].view(count, -1, self.size)
        if layer.qk_scale is not None:
            turned = _normed(turned, layer.qk_eps).mul_(layer.qk_scale)
        pairs = turned.view(*turned.shape[:-1], -1, 2)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * rotations.unsqueeze(1))
        return turned.flatten(2), made[:, split:].view(count, self.heads, self.size)

    def finish(self, layer: _Layer, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The hidden state (N, H) behind a layer, from that before it and what its heads saw,
        (N, Q·d)."""
        hidden = _plus(hidden, attended, layer.out, layer.out_bias)
        both = functional.linear(_normed(hidden, self._eps), layer.gate_up, layer.gate_up_bias)
        gate, up = both.chunk(2, dim=-1)
        return _plus(hidden, functional.silu(gate).mul_(up), layer.down, layer.down_bias)

    def last(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head takes."""
        return _normed(hidden, self._eps).mul_(self._last)

    # -- the weights ----------------------------------------------------------------

    def _layer(self, layer: Any, width: int) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        scale = float(attention.scaling)
        order = self._order(self._last.device)
        query, key = (
            self._rows(projection, order) for projection in (attention.q_proj, attention.k_proj)
        )
        qk_scale = None
        qk_eps = self._eps
        if hasattr(attention, "q_norm"):
            ones = [
                norm.weight.detach()[order] * math.sqrt(self.size)
                for norm in (attention.q_norm, attention.k_norm)
            ]
            heads = (self.query_heads, self.heads)
            parts = [one.expand(n, -1) for one, n in zip(ones, heads, strict=True)]
            qk_scale = torch.cat([parts[0] * scale, parts[1]])
            qk_eps = self._constant(math.sqrt(self.size * attention.q_norm.variance_epsilon))
        else:
            query = _scaled(query, scale)
        before = layer.input_layernorm.weight.detach() * math.sqrt(width)
        between = layer.post_attention_layernorm.weight.detach() * math.sqrt(width)
        qkv, qkv_bias = _stacked([query, key, _parts(attention.v_proj)], before)
        gate_up = _stacked([_parts(mlp.gate_proj), _parts(mlp.up_proj)], between)
        return _Layer(
            qkv, qkv_bias, qk_scale, qk_eps,
            *_parts(attention.o_proj), *gate_up, *_parts(mlp.down_proj),
        )  # fmt: skip

    def _order(self, device: torch.device) -> torch.Tensor:
        """The entries of a head, the two that are turned together side by side."""
        every = torch.arange(self.size, device=device)
        return every.view(2, -1).t().reshape(-1)

    def _rows(self, projection: Any, order: torch.Tensor) -> _Weights:
        """A projection's rows, those of each head in ``order``."""
        weight, bias = _parts(projection)
        rows = weight.view(-1, self.size, weight.shape[1])[:, order].reshape(weight.shape)
        if bias is not None:
            bias = bias.view(-1, self.size)[:, order].reshape(-1)
        return rows, bias

    def _constant(self, value: float) -> torch.Tensor:
        return torch.tensor(value, device=self._embed.weight.device)


_Weights = tuple[torch.Tensor, torch.Tensor | None]


def _parts(projection: Any) -> _Weights:
    bias = projection.bias
    return projection.weight.detach(), None if bias is None else bias.detach()


def _scaled(weights: _Weights, factor: float) -> _Weights:
    weight, bias = weights
    return weight * factor, None if bias is None else bias * factor


def _stacked(parts: list[_Weights], columns: torch.Tensor) -> _Weights:
    """The parts as one projection of an input that is to be multiplied by ``columns``."""
    weight = torch.cat([weight for weight, _ in parts]) * columns
    if all(bias is None for _, bias in parts):
        return weight, None
    biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts]
    return weight, torch.cat(biases)


def _normed(values: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """x/√(Σx² + eps²) over the last dimension."""
    length = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    return values / torch.hypot(length, eps)


def _plus(
    hidden: torch.Tensor, values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    summed = torch.addmm(hidden, values, weight.t())
    return summed if bias is None else summed + bias
