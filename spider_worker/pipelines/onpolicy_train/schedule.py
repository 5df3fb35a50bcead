"""The learning rate over a run."""

from __future__ import annotations

__all__ = ["LearningRate"]

import dataclasses

from spider_sdk.config.model import OnPolicyOptions
from spider_sdk.errors import FatalJobError


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """What each optimiser step is taken with. ``schedule`` ``constant`` is ``peak`` throughout,
    ``linear`` falls from it to 0 at the run's end: after ``batches`` of the data or ``tokens``
    sampled, whichever comes first. None: that ends no run, or is not known beforehand.

    Depends on nothing but how far the run is, so that one that is taken up goes on as it was.
    """

    peak: float
    schedule: str = "constant"
    batches: int | None = None
    tokens: int | None = None

    @classmethod
    def of(cls, options: OnPolicyOptions, batches: int | None) -> LearningRate:
        """Raises FatalJobError for a schedule towards an end that nobody knows."""
        if options.lr_schedule != "constant" and batches is None and options.token_budget is None:
            raise FatalJobError(
                f"lr_schedule: {options.lr_schedule} has to know where the run ends, and how many"
                " rows this source has is not known; set token_budget, or lr_schedule: constant"
            )
        return cls(options.learning_rate, options.lr_schedule, batches, options.token_budget)

    def at(self, batches: float, tokens: float) -> float:
        """After so many batches (skipped ones too) and sampled tokens; parts of a batch count."""
        if self.schedule == "constant":
            return self.peak
        gone = [
            done / whole
            for done, whole in ((batches, self.batches), (tokens, self.tokens))
            if whole is not None
        ]
        return self.peak * max(0.0, 1 - max(gone))
