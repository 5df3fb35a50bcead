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

from spider_sdk.errors import FatalJobError
from spider_worker.tokens import SampledTokens, SampleParams
from spider_worker.torch_models.causal import CausalModel
from spider_worker.torch_models.drawing import draw
from spider_worker.torch_models.steps import LeanSteps, PlainSteps, Steps, prefill


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

    Raises FatalJobError where the model's logits are not finite.
    """
    batch = _Batch(model, rows, params)
    while batch.draw() and not abandoned():
        batch.advance()
    return batch.samples()


class _Batch:
    """Rows on their way. Tensors called ``_of_…`` have an entry for each of ``rows``, others
    for each row that is still in the batch, in the order of ``_present``."""

    def __init__(self, model: CausalModel, rows: Sequence[Row], params: SampleParams) -> None:
        self._model, self._params = model, params
        device = model.device
        longest = max(row.limit for row in rows)
        numbers = np.zeros((len(rows), longest))
        for number, row in enumerate(rows):
            numbers[number, : row.limit] = row.numbers
        self._numbers = torch.from_numpy(numbers).to(device)
        self._limits = torch.tensor([row.limit for row in rows], device=device)
        self._stops = torch.tensor(sorted(set(params.stop)), device=device, dtype=torch.long)
        self._of_tokens = torch.zeros((len(rows), longest), device=device, dtype=torch.long)
        self._of_logprobs = torch.zeros((len(rows), longest), device=device)
        self._of_end = [0] * len(rows)
        self._of_stopped = [False] * len(rows)
        self._present = torch.arange(len(rows), device=device)
        self._names = list(range(len(rows)))  # _present, for Python
        self._step = 0
        self._prefill(rows, longest)

    def _prefill(self, rows: Sequence[Row], longest: int) -> None:
        device = self._model.device
        prompts = {prompt: at for at, prompt in enumerate(dict.fromkeys(r.prompt for r in rows))}
        self._width = width = max(map(len, prompts))
        last, cache = prefill(self._model, list(prompts))
        which = torch.tensor([prompts[row.prompt] for row in rows], device=device)
        self._logits = self._model.logits(last)[which]
        self._steps: Steps = (
            LeanSteps(self._model, cache, which, width + longest)
            if self._model.lean
            else PlainSteps(self._model, cache, which)
        )
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._positions = lengths[which]
        self._mask: torch.Tensor | None = None
        if any(len(prompt) < width for prompt in prompts):
            column = torch.arange(width + longest, device=device)
            seen = (column < self._positions.unsqueeze(1)) | (column >= width)
            self._mask = seen[:, None, None, :]

    def draw(self) -> bool:
        """The next token of each row. False: every row has ended."""
        at = self._step
        tokens, logprobs = draw(self._logits, self._numbers[:, at], self._params)
        self._of_tokens[self._present, at] = tokens
        self._of_logprobs[self._present, at] = logprobs
        self._tokens = tokens
        self._step = at + 1
        stopped = torch.isin(tokens, self._stops)
        over = stopped | (self._limits <= self._step)
        flags = over.tolist()
        going = 0
        for name, ended, stop in zip(self._names, flags, stopped.tolist(), strict=True):
            if self._of_end[name]:
                continue
            if ended:
                self._of_end[name], self._of_stopped[name] = self._step, stop
            else:
                going += 1
        if going and going <= 0.75 * len(self._names):
            self._compact()
        return going > 0

    def _compact(self) -> None:
        keep = [at for at, name in enumerate(self._names) if not self._of_end[name]]
        self._names = [self._names[at] for at in keep]
        index = torch.tensor(keep, device=self._model.device)
        self._present = self._present[index]
        self._tokens = self._tokens[index]
        self._positions = self._positions[index]
        self._numbers = self._numbers[index]
        self._limits = self._limits[index]
        if self._mask is not None:
            self._mask = self._mask[index]
        self._steps.select(index)

    def advance(self) -> None:
        """Logits of the tokens after those drawn."""
        mask = self._mask
        if mask is not None:
            mask = mask[..., : self._width + self._step]
        hidden = self._steps.step(self._tokens, self._positions, mask)
        self._positions = self._positions + 1
        self._logits = self._model.logits(hidden)

    def samples(self) -> list[SampledTokens]:
        tokens = self._of_tokens.cpu().numpy()
        logprobs = self._of_logprobs.cpu().numpy()
        if np.isnan(logprobs[:, : self._step]).any():
            raise FatalJobError(
                f"The logits of {self._model.name!r} are not finite: its weights are broken, or "
                "training has diverged. Lower learning_rate, or use dtype float32."
            )
        ends = [end or self._step for end in self._of_end]
        return [
            SampledTokens(
                tuple(tokens[row, :end].tolist()),
                logprobs[row, :end].copy(),
                "stop" if self._of_stopped[row] else "length",
            )
            for row, end in enumerate(ends)
        ]
