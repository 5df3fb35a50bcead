"""What a job may use of the fleet at a time, and spend over all of it.

The claim script enforces these: it counts what is live on every worker in one step, so that two
workers can never both take the last place or the last dollar.
"""

from __future__ import annotations

__all__ = ["Caps", "argument"]

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from spider_sdk.config.model import SweConfig


@dataclasses.dataclass(frozen=True)
class Caps:
    """None is no cap.

    ``max_runners`` bounds the runners of a job, ``max_live`` its work units that are leased.
    ``budget`` is US dollars for the whole job; each claim of a work unit reserves ``reserve`` of
    them (None: an even part of what is left), its *grant*.
    """

    max_runners: int | None = None
    max_live: int | None = None
    budget: float | None = None
    reserve: float | None = None

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """The caps of a valid job document."""
        swe = document.get("swe")
        if not isinstance(swe, Mapping):
            return cls(max_runners=document.get("parallelism"))
        return cls(
            max_live=int(swe.get("num_workers") or SweConfig.num_workers),
            budget=swe.get("max_budget_total"),
            reserve=swe.get("max_budget_per_instance"),
        )

    @property
    def runners(self) -> int | None:
        """So many runners can be of use."""
        known = [most for most in (self.max_runners, self.max_live) if most is not None]
        return min(known, default=None)


def argument(cap: float | None) -> str:
    """A cap for a script: '' where there is none."""
    return "" if cap is None else repr(cap)
