"""The learning rate over a run."""

from __future__ import annotations

__all__ = ["LearningRate"]

import dataclasses

from spider_sdk.config.model import OnPolicyOptions
from spider_sdk.errors import FatalJobError
from spider_worker.pipelines.onpolicy_train.prompts import Cursor


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """What optimiser steps are taken with: ``peak`` throughout, or with ``linear`` less and less of
    it, down to 0 at the run's end. That is behind the last of ``rows`` (held-out ones and those
    that make no prompt counted) in the last of ``epochs``, or after ``tokens`` sampled, whichever
    comes first; None: it ends no run, or is not known.

    Depends on nothing but how far the run is, so that one that is taken up goes on as it was.
    """

    peak: float
    linear: bool
    rows: int | None
    epochs: int
    tokens: int | None

    @classmethod
    def of(cls, options: OnPolicyOptions, rows: int | None) -> LearningRate:
        """Raises FatalJobError for a schedule towards an end that nobody knows."""
        linear = options.lr_schedule == "linear"
        if linear and rows is None and options.token_budget is None:
            raise FatalJobError(
                "lr_schedule: linear has to know where the run ends, and how many rows this stream"
                " has is not known; set token_budget or source.max_examples, or use lr_schedule:"
                " constant"
            )
        return cls(options.learning_rate, linear, rows, options.epochs, options.token_budget)

    def of_batch(
        self, start: Cursor, end: Cursor, tokens: int, sampled: int, parts: int
    ) -> list[float]:
        """The rates of the ``parts`` that a batch is cut into, of the rows from ``start`` to
        ``end``, with ``tokens`` sampled before it and ``sampled`` in it."""
        if not self.linear:
            return [self.peak] * parts
        before, after = self._gone(start, tokens), self._gone(end, tokens + sampled)
        return [self.peak * (1 - before - (after - before) * part / parts) for part in range(parts)]

    def _gone(self, cursor: Cursor, tokens: int) -> float:
        """The share of the run that lies behind, in [0, 1]."""
        shares = [0.0]
        if self.rows:
            read = cursor.epoch * self.rows + cursor.index
            shares.append(read / (self.epochs * self.rows))
        if self.tokens:
            shares.append(tokens / self.tokens)
        return min(1.0, max(shares))
