"""A teacher's whole distribution as one over the student's tokens, where its vocabulary is small
enough to take all of it: ``marginal``'s sums, over columns that are the same at every position."""

from __future__ import annotations

__all__ = ["WholeMap"]

import numpy as np
from numpy.typing import NDArray

from spider_worker.distill.alignment import Indices, Spans

Floats = NDArray[np.float32]


class WholeMap:
    """``image`` and ``told`` as ``PrefixMap``'s; ``width`` is that of the teacher's distributions.
    ``ids`` (U,) int64 are the student's tokens that are targets, ascending."""

    def __init__(self, image: Indices, told: NDArray[np.bool_], width: int) -> None:
        mapped = image[:width]
        columns = np.flatnonzero((mapped >= 0) & told[mapped])
        columns = columns[np.argsort(mapped[columns], kind="stable")]
        self.ids, starts = np.unique(mapped[columns], return_index=True)
        # Most targets are of one column, and sums of one cost as much as others: the first columns
        # are taken as they are, and only what is beside them is summed.
        self._first, self._others = columns[starts], np.delete(columns, starts)
        images = np.searchsorted(self.ids, mapped[self._others])
        self._runs = np.flatnonzero(np.diff(images, prepend=-1))
        self._summed = images[self._runs]
        self._known = np.zeros(len(told) + 1, dtype=bool)  # the last: tokens beyond the vocabulary
        self._known[self.ids] = True

    def targets(
        self, spans: Spans, sampled: Indices, logprobs: Floats
    ) -> tuple[Indices, Indices, Floats]:
        """As ``PrefixMap.targets``, of ``logprobs`` (M, V_teacher). The rows of ``ids`` (P, U) are
        one."""
        drawn = sampled[spans.student_begin]
        usable = self._known[np.minimum(drawn, len(self._known) - 1)]
        positions, rows = spans.student_begin[usable], spans.teacher_begin[usable]
        ids = np.broadcast_to(self.ids, (len(positions), len(self.ids)))
        if not positions.size:
            return positions, ids, np.zeros(ids.shape, np.float32)
        table = logprobs[rows]
        probs = np.exp(table.take(self._first, axis=1))
        others = np.exp(table.take(self._others, axis=1))
        probs[:, self._summed] += np.add.reduceat(others, self._runs, axis=1)
        return positions, ids, probs
