"""One more token for each row of a batch: by ``transformers``, or by fewer calls.

For a small model most of a step is what ``transformers`` does around the arithmetic: masks,
caches that are copied, norms in six calls. ``LeanSteps`` does a step of the common family of
models in two thirds of the time. It computes with the model's own modules, so that adapters count,
and serves only models for which ``is_lean`` found it to agree.
"""

from __future__ import annotations

__all__ = ["LeanSteps", "PlainSteps", "Steps", "is_lean", "prefill"]

import importlib
from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch.nn import functional

from spider_worker.torch_models.causal import CausalModel

_LEAN: Final = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_ROPES: Final = ("default", "linear", "llama3")  # those that do not change with the length


class Steps(Protocol):
    """Keys and values of B rows. Those of prompts fill ``width`` columns; each step is another.
    ``mask`` (B, 1, 1, columns) is True for what a row sees, None where that is everything."""

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Hidden states (B, H) after ``tokens`` (B,), which stand at ``positions`` (B,)."""

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order."""


def prefill(model: CausalModel, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Any]:
    """Hidden states (U, H) at the last token of each prompt, and the cache of ``transformers``
    over all of them, padded on the right."""
    padded = np.zeros((len(prompts), max(map(len, prompts))), np.int64)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    transformers: Any = importlib.import_module("transformers")
    cache = transformers.DynamicCache(config=model.config)
    ids = torch.from_numpy(padded).to(model.device)
    hidden = model.hidden(ids, past_key_values=cache, use_cache=True)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=model.device)
    return hidden[torch.arange(len(prompts), device=model.device), last], cache


class PlainSteps:
    """As ``transformers`` does it, for any model."""

    def __init__(self, model: CausalModel, cache: Any, rows: torch.Tensor) -> None:
        self._model, self._cache = model, cache
        cache.batch_select_indices(rows)

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        hidden = self._model.hidden(
            tokens.unsqueeze(1),
            # A row that has ended and is still here may be past the positions there are.
            position_ids=positions.clamp(max=self._model.context - 1).unsqueeze(1),
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
        )
        return hidden[:, -1]

    def select(self, rows: torch.Tensor) -> None:
        self._cache.batch_select_indices(rows)


class LeanSteps:
    """For models that ``is_lean``; ``room`` is how many columns there will be."""

    def __init__(self, model: CausalModel, cache: Any, rows: torch.Tensor, room: int) -> None:
        self._backbone = model.module.base_model
        self._column = width = int(cache.get_seq_length())
        self._caches = []
        for layer in cache.layers:
            pair = []
            for filled in (layer.keys, layer.values):
                _, heads, _, size = filled.shape
                buffer = filled.new_empty((len(rows), heads, room, size))
                buffer[:, :, :width] = filled[rows]
                pair.append(buffer)
            self._caches.append(pair)
        every = torch.arange(room, device=model.device).unsqueeze(0)
        cos, sin = self._backbone.rotary_emb(self._caches[0][0], every)
        half = sin.shape[-1] // 2
        self._cos = cos[0]
        self._sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        cos, sin = self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)
        hidden: torch.Tensor = self._backbone.embed_tokens(tokens)
        for layer, (keys, values) in zip(self._backbone.layers, self._caches, strict=True):
            normed = _norm(layer.input_layernorm, hidden)
            hidden = hidden + self._attend(layer.self_attn, normed, cos, sin, keys, values, mask)
            hidden = hidden + layer.mlp(_norm(layer.post_attention_layernorm, hidden))
        self._column += 1
        return _norm(self._backbone.norm, hidden)

    def _attend(
        self,
        module: Any,
        normed: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        at, count = self._column, len(normed)
        shape = (count, -1, module.head_dim)
        query, key = module.q_proj(normed).view(shape), module.k_proj(normed).view(shape)
        if hasattr(module, "q_norm"):
            query, key = _norm(module.q_norm, query), _norm(module.k_norm, key)
        heads = query.shape[1]
        both = torch.cat([query, key], dim=1)
        first, second = both.chunk(2, dim=-1)
        both = torch.addcmul(both * cos, torch.cat([second, first], dim=-1), sin)
        keys[:, :, at] = both[:, heads:]
        values[:, :, at] = module.v_proj(normed).view(shape)
        attended = functional.scaled_dot_product_attention(
            both[:, :heads].unsqueeze(2),
            keys[:, :, : at + 1],
            values[:, :, : at + 1],
            attn_mask=mask,
            scale=module.scaling,
            enable_gqa=True,
        )
        return module.o_proj(attended.reshape(count, -1))  # type: ignore[no-any-return]

    def select(self, rows: torch.Tensor) -> None:
        self._caches = [[buffer[rows] for buffer in pair] for pair in self._caches]


def _norm(module: Any, values: torch.Tensor) -> torch.Tensor:
    weight = module.weight
    return functional.rms_norm(values, weight.shape, weight, module.variance_epsilon)


@torch.inference_mode()
def is_lean(model: CausalModel) -> bool:
    """Whether LeanSteps serve ``model``: one of the family, in float32 (in less the norms round
    elsewhere), and a trial agrees with ``transformers``."""
    module = model.module
    if (
        type(module).__name__ not in _LEAN
        or not model.takes_masks
        or module.dtype != torch.float32
        or getattr(module.base_model.rotary_emb, "rope_type", None) not in _ROPES
        or model.context < 8
    ):
        return False
    device = model.device
    prompts = [[number % model.vocabulary for number in range(n, n + 4)] for n in (0, 7)]
    rows, tokens = torch.tensor([1, 0], device=device), torch.tensor([0, 1], device=device)
    found = []
    for lean in (False, True):
        _, cache = prefill(model, prompts)
        steps = LeanSteps(model, cache, rows, 6) if lean else PlainSteps(model, cache, rows)
        at = torch.tensor([4, 4], device=device)
        first = steps.step(tokens, at, None)
        found.append(torch.cat([first, steps.step(tokens, at + 1, None)]))
    return torch.allclose(model.logits(found[0]), model.logits(found[1]), rtol=1e-3, atol=1e-3)
