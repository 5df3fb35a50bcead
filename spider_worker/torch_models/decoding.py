"""Sampling a batch: one prefill for each prompt, then a token a row at a time.

Prompts are padded on the right, so that the prefill needs no mask; from then on a row's mask
hides the gap between its prompt and the column where all rows go on. Rows that have ended
leave the batch when a quarter of it has.
"""

from __future__ import annotations

__all__ = ["Row", "decode"]

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from spider_sdk.errors import Diverged
from spider_worker.tokens import SampledTokens, SampleParams
from spider_worker.torch_models.causal import CausalModel
from spider_worker.torch_models.drawing import draw
from spider_worker.torch_models.steps import begin


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One sample to draw: at most ``limit`` (≥ 1) tokens after ``prompt``, by ``numbers``
    (limit,) of [0, 1)."""

    prompt: tuple[int, ...]
    limit: int
    numbers: NDArray[np.float64]


@torch.inference_mode()
def decode(
    model: CausalModel,
    rows: Sequence[Row],
    params: SampleParams,
    *,
    abandoned: Callable[[], bool] = lambda: False,
) -> list[SampledTokens]:
    """A sample for each of ``rows``, in order; ``max_tokens`` and ``seed`` of ``params`` are
    theirs. Prompts of several lengths only where ``model.takes_masks``. ``abandoned`` is asked
    before each token whether nobody waits any more; what was drawn until then is returned.

    Raises Diverged where the model's logits are not finite.
    """
    batch = _Batch(model, rows, params)
    while batch.draw() and not abandoned():
        batch.advance()
    return batch.samples()


class _Batch:
    """Rows on their way. ``_names`` are those that are still in the batch, and what stands beside
    them has an entry for each, in their order."""

    def __init__(self, model: CausalModel, rows: Sequence[Row], params: SampleParams) -> None:
        self._model, self._params = model, params
        device = model.device
        longest = max(row.limit for row in rows)
        numbers = np.zeros((len(rows), longest))
        for number, row in enumerate(rows):
            numbers[number, : row.limit] = row.numbers
        self._numbers = torch.from_numpy(numbers).to(device)
        self._stops = frozenset(params.stop)
        self._limits = [row.limit for row in rows]
        self._names = list(range(len(rows)))
        self._said: list[list[int]] = [[] for _ in rows]
        self._stopped = [False] * len(rows)
        #: Of each step, who was in the batch and with what log-probabilities they drew.
        self._drawn: list[tuple[list[int], torch.Tensor]] = []
        prompts = {prompt: at for at, prompt in enumerate(dict.fromkeys(r.prompt for r in rows))}
        which = torch.tensor([prompts[row.prompt] for row in rows], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._positions = lengths[which]
        last, self._steps = begin(model, list(prompts), which, longest)
        self._logits = model.logits(last)[which]

    def draw(self) -> bool:
        """The next token of each row. False: every row has ended."""
        at = len(self._drawn)
        self._tokens, logprobs = draw(self._logits, self._numbers[:, at], self._params)
        self._drawn.append((self._names, logprobs))
        going = []
        for place, (name, token) in enumerate(zip(self._names, self._tokens.tolist(), strict=True)):
            said = self._said[name]
            if self._stopped[name] or len(said) == self._limits[name]:
                continue  # it has ended, and is still here
            said.append(token)
            self._stopped[name] = token in self._stops
            if not self._stopped[name] and len(said) < self._limits[name]:
                going.append(place)
        if going and len(going) <= 0.75 * len(self._names):
            self._compact(going)
        return bool(going)

    def _compact(self, places: Sequence[int]) -> None:
        self._names = [self._names[place] for place in places]
        index = torch.tensor(places, device=self._model.device)
        self._tokens = self._tokens[index]
        self._positions = self._positions[index]
        self._numbers = self._numbers[index]
        self._steps.select(index)

    def advance(self) -> None:
        """Logits of the tokens after those drawn."""
        hidden = self._steps.step(self._tokens, self._positions)
        self._positions = self._positions + 1
        self._logits = self._model.logits(hidden)

    def samples(self) -> list[SampledTokens]:
        """Raises Diverged where a log-probability is no number."""
        table = np.zeros((len(self._said), len(self._drawn)), np.float32)
        flat = torch.cat([logprobs for _, logprobs in self._drawn]).cpu().numpy()
        if np.isnan(flat).any():
            raise Diverged(
                f"The logits of {self._model.name!r} are not finite: its weights are broken, or "
                "training has diverged. Lower learning_rate, or use dtype float32."
            )
        start = 0
        for column, (names, _) in enumerate(self._drawn):
            table[names, column] = flat[start : start + len(names)]
            start += len(names)
        return [
            SampledTokens(
                tuple(said), table[row, : len(said)].copy(), "stop" if stopped else "length"
            )
            for row, (said, stopped) in enumerate(zip(self._said, self._stopped, strict=True))
        ]
