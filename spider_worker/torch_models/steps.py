"""One more token for each row of a batch: by ``transformers``, or by fewer calls where
``is_lean``."""

from __future__ import annotations

__all__ = ["LeanSteps", "PlainSteps", "Steps", "begin", "is_lean"]

import importlib
from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import torch

from spider_worker.torch_models.causal import CausalModel
from spider_worker.torch_models.lean import LeanModel
from spider_worker.torch_models.padding import padded

_LEAN: Final = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_ROPES: Final = ("default", "linear", "llama3")  # those that do not change with the length


class Steps(Protocol):
    """Keys and values of B rows. Those of prompts fill the first columns; each step is another."""

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, H) after ``tokens`` (B,), which stand at ``positions`` (B,)."""

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order."""


def begin(
    model: CausalModel, prompts: Sequence[Sequence[int]], rows: torch.Tensor, room: int
) -> tuple[torch.Tensor, Steps]:
    """Run U prompts and go on from there with B rows, each of the prompt that ``rows`` (B,) names,
    for ``room`` steps. Returns the hidden states (U, H) at the prompts' last tokens."""
    lengths = np.fromiter(map(len, prompts), np.int64)
    width = int(lengths.max())
    device = model.device
    ids, ends = torch.from_numpy(padded(prompts)).to(device), torch.from_numpy(lengths).to(device)
    seen = None
    if lengths.min() < width:
        # What is padding in a prompt is a gap before the columns where all rows go on.
        columns = torch.arange(width + room, device=device)
        seen = (columns < ends[rows].unsqueeze(1)) | (columns >= width)
    last = torch.arange(len(prompts), device=device) * width + ends - 1
    if (lean := model.lean) is not None:
        kept: list[Pair] = []
        hidden = lean.hidden(ids, last, kept)
        return hidden, LeanSteps(lean, kept, rows, width, room, seen)
    transformers: Any = importlib.import_module("transformers")
    cache = transformers.DynamicCache(config=model.config)
    hidden = model.hidden(ids, past_key_values=cache, use_cache=True).flatten(0, 1)[last]
    return hidden, PlainSteps(model, cache, rows, width, seen)


class PlainSteps:
    """As ``transformers`` does it, for any model. ``seen`` (B, columns) is True for what a row
    sees, None where that is everything."""

    def __init__(
        self,
        model: CausalModel,
        cache: Any,
        rows: torch.Tensor,
        width: int,
        seen: torch.Tensor | None,
    ) -> None:
        self._model, self._cache, self._columns, self._seen = model, cache, width, seen
        cache.batch_select_indices(rows)

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self._columns += 1
        seen = self._seen
        hidden = self._model.hidden(
            tokens.unsqueeze(1),
            # A row that has ended and is still here may be past the positions there are.
            position_ids=positions.clamp(max=self._model.context - 1).unsqueeze(1),
            attention_mask=None if seen is None else seen[:, None, None, : self._columns],
            past_key_values=self._cache,
            use_cache=True,
        )
        return hidden[:, -1]

    def select(self, rows: torch.Tensor) -> None:
        self._cache.batch_select_indices(rows)
        if self._seen is not None:
            self._seen = self._seen[rows]


Pair = tuple[torch.Tensor, torch.Tensor]


class LeanSteps:
    """``kept`` are the prompts' keys and values, as ``LeanModel.hidden`` leaves them."""

    def __init__(
        self,
        lean: LeanModel,
        kept: Sequence[Pair],
        rows: torch.Tensor,
        width: int,
        room: int,
        seen: torch.Tensor | None,
    ) -> None:
        self._lean, self._column = lean, width
        self._rotations = lean.rotations(width + room)
        self._caches = [tuple(_buffer(part, rows, room) for part in pair) for pair in kept]
        self._bias = None
        if seen is not None:
            hidden = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)
            self._bias = hidden.repeat_interleave(lean.heads, dim=0).unsqueeze(1)

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        lean, at = self._lean, self._column
        rotations = self._rotations[positions]
        hidden = lean.embed(tokens)
        for layer, (keys, values) in zip(lean.layers, self._caches, strict=True):
            turned, made = lean.project(layer, hidden, rotations)
            keys[:, :, at] = turned[:, lean.query_heads :]
            values[:, :, at] = made
            attended = self._attend(turned[:, : lean.query_heads], keys, values)
            hidden = lean.finish(layer, hidden, attended)
        self._column = at + 1
        return lean.last(hidden)

    def _attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """(B, Q·d). Plain products: for a single query they are faster than the kernels that are
        made for many."""
        count, size = len(queries), self._lean.size
        grouped = queries.reshape(count * self._lean.heads, -1, size)
        columns = self._column + 1
        seen = keys.flatten(0, 1)[:, :columns].transpose(1, 2)
        if self._bias is None:
            weights = torch.bmm(grouped, seen)
        else:
            weights = torch.baddbmm(self._bias[..., :columns], grouped, seen)
        attended = torch.bmm(weights.softmax(dim=-1), values.flatten(0, 1)[:, :columns])
        return attended.view(count, -1)

    def select(self, rows: torch.Tensor) -> None:
        self._caches = [tuple(buffer[rows] for buffer in pair) for pair in self._caches]
        if self._bias is not None:
            by_row = self._bias.view(-1, self._lean.heads, *self._bias.shape[1:])
            self._bias = by_row[rows].flatten(0, 1)


def _buffer(kept: torch.Tensor, rows: torch.Tensor, room: int) -> torch.Tensor:
    """(B, K, columns, d) with ``room`` more columns than ``kept`` (U, columns, K, d)."""
    _, columns, heads, size = kept.shape
    buffer = kept.new_empty((len(rows), heads, columns + room, size))
    buffer[:, :, :columns] = kept[rows].transpose(1, 2)
    return buffer


def _turns_whole_heads(backbone: Any) -> bool:
    """Whether every entry of a head is turned, by angles that do not change with the length."""
    rotary = backbone.rotary_emb
    if getattr(rotary, "rope_type", None) not in _ROPES:
        return False
    return bool(2 * rotary.inv_freq.numel() == backbone.layers[0].self_attn.head_dim)


@torch.inference_mode()
def is_lean(model: CausalModel) -> bool:
    """Whether LeanModel is ``model``: one of the family, in float32 (in less the norms round
    elsewhere), and a trial agrees with ``transformers``."""
    module = model.module
    if (
        type(module).__name__ not in _LEAN
        or not model.takes_masks
        or module.dtype != torch.float32
        or not _turns_whole_heads(module.base_model)
        or model.context < 8
        or not LeanModel.fits(module)
    ):
        return False
    device = model.device
    prompts = [[number % model.vocabulary for number in range(n, n + n % 4 + 3)] for n in (0, 7)]
    rows, tokens = torch.tensor([1, 0], device=device), torch.tensor([0, 1], device=device)
    at = torch.tensor([len(prompts[1]), len(prompts[0])], device=device)
    found = []
    for lean in (False, True):
        model.may_be_lean = lean
        states, steps = begin(model, prompts, rows, 2)
        found.append(torch.cat([states, steps.step(tokens, at), steps.step(tokens, at + 1)]))
    return torch.allclose(model.logits(found[0]), model.logits(found[1]), rtol=1e-3, atol=1e-3)
