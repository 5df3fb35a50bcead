"""What sequences of a batch begin with alike, to be run once for all of them.

The samples of a prompt are scored, and trained on, together, and their prompt may well be the
longer part: with a group of eight, seven of its eight passes say nothing new. So each different
prefix is run by itself, and the rest of every sequence on the keys and values of its own.
"""

from __future__ import annotations

__all__ = ["Batch", "gather"]

import dataclasses
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from spider_worker.torch_models.padding import padded

#: Of the tokens that a batch has without it, padding included, at most so many may be left with it.
_WORTH: Final = 0.9


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Sequences B, cut in two. Their prefixes, of which U are different, are ``prefixes``
    (U, ``width``), padded on the right; ``lengths`` (B,) says how long each sequence's is, and
    ``which`` (B,) which one it is. What follows is ``ids`` (B, T), padded on the right."""

    prefixes: torch.Tensor
    lengths: torch.Tensor
    which: torch.Tensor
    ids: torch.Tensor

    @property
    def width(self) -> int:
        return self.prefixes.shape[1]

    @property
    def positions(self) -> torch.Tensor:
        """(B, T): where the tokens of ``ids`` stand in their sequences."""
        return self.lengths.unsqueeze(1) + torch.arange(self.ids.shape[1], device=self.ids.device)

    def seen(self) -> torch.Tensor:
        """(B, 1, T, width + T): whether a token sees a column: those of its prefix, and of the rest
        all up to itself."""
        rest = self.ids.shape[1]
        device = self.ids.device
        before = torch.arange(self.width, device=device) < self.lengths.unsqueeze(1)
        causal = torch.ones(rest, rest, dtype=torch.bool, device=device).tril()
        rows = len(self.ids)
        parts = [before.unsqueeze(1).expand(rows, rest, -1), causal.expand(rows, -1, -1)]
        return torch.cat(parts, dim=2).unsqueeze(1)


def gather(
    sequences: Sequence[NDArray[np.int64]], starts: Sequence[int], device: torch.device
) -> Batch | None:
    """The batch of ``sequences``, none of them empty, each of which is cut before the place
    ``starts`` (from 0); None where that would not be worth a pass of its own."""
    prefixes: dict[bytes, int] = {}
    which = np.empty(len(sequences), np.int64)
    found: list[NDArray[np.int64]] = []
    for row, (tokens, start) in enumerate(zip(sequences, starts, strict=True)):
        prefix = tokens[:start]
        which[row] = prefixes.setdefault(prefix.tobytes(), len(found))
        if which[row] == len(found):
            found.append(prefix)
    rests = [tokens[start:] for tokens, start in zip(sequences, starts, strict=True)]
    before, behind = padded(found), padded(rests)
    whole = len(sequences) * max(len(tokens) for tokens in sequences)
    if before.size + behind.size > _WORTH * whole:
        return None
    lengths = np.asarray([len(found[number]) for number in which], np.int64)
    made = (torch.from_numpy(array).to(device) for array in (before, lengths, which, behind))
    return Batch(*made)
