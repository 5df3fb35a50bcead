"""Log-probabilities and distributions of given tokens, for many sequences at once."""

from __future__ import annotations

__all__ = ["LOGITS", "chunks", "distributions", "micro_batches", "preceding", "score"]

import importlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from spider_worker.tokens import Ids, TokenScores, TopK
from spider_worker.torch_models.causal import CausalModel
from spider_worker.torch_models.padding import padded
from spider_worker.torch_models.prefixes import Batch, gather

LOGITS: Final = 1 << 25
"""The most logits that exist at once: 128 MiB in float32."""


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut sequences of ``lengths`` into batches of at most ``budget`` tokens, padding included,
    neighbours in length together; a sequence that is longer makes one of its own. A function
    of the lengths alone, so that a repeated run sums in the same order."""
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: (lengths[number], number)):
        if batches and (len(batches[-1]) + 1) * lengths[number] <= budget:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def preceding(
    model: CausalModel,
    sequences: Sequence[Ids | NDArray[np.int64]],
    positions: Sequence[NDArray[np.int64]],
    *,
    share: bool = True,
) -> torch.Tensor:
    """(P, H): the hidden state before each of ``positions`` (from 1), sequence by sequence. What
    stands behind the last of them is not run, and with ``share`` what several begin with is run
    once."""
    ends = [int(at.max(initial=1)) for at in positions]
    runs = [np.asarray(tokens[:end], np.int64) for tokens, end in zip(sequences, ends, strict=True)]
    lean = model.lean if torch.is_inference_mode_enabled() else None
    # The token before the first wanted place is the first whose state is.
    starts = [int(at.min(initial=end)) - 1 for at, end in zip(positions, ends, strict=True)]
    batch = gather(runs, starts, model.device) if model.takes_masks and share else None
    if batch is None:
        starts = [0] * len(runs)
    width = max(end - start for start, end in zip(starts, ends, strict=True))
    rows = np.repeat(np.arange(len(runs)), [len(at) for at in positions])
    firsts = np.repeat(starts, [len(at) for at in positions])
    places = rows * width + np.concatenate(positions) - 1 - firsts
    wanted = torch.from_numpy(places).to(model.device)
    if batch is not None:
        return lean.following(batch, wanted) if lean else _following(model, batch)[wanted]
    ids = torch.from_numpy(padded(runs)).to(model.device)
    return lean.hidden(ids, wanted) if lean else model.hidden(ids).flatten(0, 1)[wanted]


def _following(model: CausalModel, batch: Batch) -> torch.Tensor:
    """(B·T, H): the hidden states of what follows the prefixes, with a gradient where there is
    one."""
    transformers: Any = importlib.import_module("transformers")
    cache = transformers.DynamicCache(config=model.config)
    model.hidden(batch.prefixes, past_key_values=cache, use_cache=True)
    cache.batch_select_indices(batch.which)
    return model.hidden(
        batch.ids,
        # Padding may be past the positions there are.
        position_ids=batch.positions.clamp(max=model.context - 1),
        attention_mask=batch.seen(),
        past_key_values=cache,
        use_cache=True,
    ).flatten(0, 1)


def chunks(count: int, vocabulary: int) -> Iterator[slice]:
    """Slices of ``count`` positions, each of at most LOGITS logits."""
    step = max(1, LOGITS // vocabulary)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


@torch.inference_mode()
def score(
    model: CausalModel, sequences: Sequence[Ids], starts: Sequence[int], topk: Sequence[int]
) -> list[TokenScores]:
    """``tokens[start:]`` of each sequence given all before, with the ``topk`` best there (0:
    none), in one pass of the model. ``starts`` count from 1."""
    positions = [
        np.arange(min(start, len(tokens)), len(tokens))
        for tokens, start in zip(sequences, starts, strict=True)
    ]
    hidden = preceding(model, sequences, positions)
    flat = [np.asarray(s, np.int64)[p] for s, p in zip(sequences, positions, strict=True)]
    targets = torch.from_numpy(np.concatenate(flat)).to(model.device)
    most = min(max(topk), model.vocabulary)
    logprobs = np.empty(len(targets), np.float32)
    best_ids = np.empty((len(targets), most), np.int64)
    best = np.empty((len(targets), most), np.float32)
    for part in chunks(len(targets), model.vocabulary):
        rows = model.logits(hidden[part]).log_softmax(dim=1)
        logprobs[part] = rows.gather(1, targets[part].unsqueeze(1)).squeeze(1).cpu().numpy()
        if most:
            values, ids = rows.topk(most, dim=1)
            best[part], best_ids[part] = values.cpu().numpy(), ids.cpu().numpy()
    ends = np.cumsum([len(at) for at in positions])
    return [
        _scores(len(tokens), at, logprobs[end - len(at) : end], best_ids[end - len(at) : end, :k],
                best[end - len(at) : end, :k], k)
        for tokens, at, end, k in zip(sequences, positions, ends, topk, strict=True)
    ]  # fmt: skip


def _scores(
    count: int,
    at: NDArray[np.int64],
    logprobs: NDArray[np.float32],
    best_ids: NDArray[np.int64],
    best: NDArray[np.float32],
    topk: int,
) -> TokenScores:
    placed = np.full(count, np.nan, np.float32)
    placed[at] = logprobs
    if not topk:
        return TokenScores(placed)
    ids = np.full((count, topk), -1, np.int64)
    values = np.full((count, topk), -np.inf, np.float32)
    found = best.shape[1]  # fewer than were asked for from a vocabulary smaller than that
    ids[at, :found], values[at, :found] = best_ids, best
    return TokenScores(placed, TopK(ids, values))


@torch.inference_mode()
def distributions(
    model: CausalModel, sequences: Sequence[Ids], positions: Sequence[NDArray[np.int64]]
) -> list[torch.Tensor]:
    """For each sequence (P, V) float32 on the CPU: the log-distribution over the token at each
    of its ``positions`` (from 1)."""
    hidden = preceding(model, sequences, positions)
    whole = torch.empty((hidden.shape[0], model.vocabulary))
    for part in chunks(hidden.shape[0], model.vocabulary):
        whole[part] = model.logits(hidden[part]).log_softmax(dim=1).cpu()
    return list(torch.split(whole, [len(at) for at in positions]))
