"""What an instance costs: dollars and tokens, of earlier attempts and of the one under way."""

from __future__ import annotations

__all__ = ["Spent", "least"]

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass
class Spent:
    """Dollars are None where they are unknown. ``this_claim`` is what the attempts of this claim of
    the unit have cost."""

    cost: float | None = 0.0
    prompt: int = 0
    completion: int = 0
    this_claim: float | None = 0.0
    attempt_cost: float | None = 0.0
    attempt_prompt: int = 0
    attempt_completion: int = 0
    turns: int = 0  #: of the attempt under way

    def now(self, cost: float | None, prompt: int, completion: int) -> None:
        self.attempt_cost, self.attempt_prompt, self.attempt_completion = cost, prompt, completion

    def settle(self) -> None:
        """The attempt has ended: it counts among the earlier ones."""
        self.cost = _sum(self.cost, self.attempt_cost)
        self.this_claim = _sum(self.this_claim, self.attempt_cost)
        self.prompt += self.attempt_prompt
        self.completion += self.attempt_completion
        self.now(0.0, 0, 0)

    def add_record(self, record: Mapping[str, Any]) -> None:
        metrics = record["metrics"]
        usage = metrics.get("accumulated_token_usage") or {}
        self.cost = _sum(self.cost, metrics.get("accumulated_cost"))
        self.prompt += usage.get("prompt_tokens", 0)
        self.completion += usage.get("completion_tokens", 0)

    def left_of(self, cap: float | None) -> float | None:
        """Of a cap on this claim, what there is for another attempt: 0.0 also where nobody knows
        what was spent. None: no cap."""
        if cap is None:
            return None
        spent = _sum(self.this_claim, self.attempt_cost)
        # A sum of prices misses a cap that it reaches by less than this.
        return 0.0 if spent is None or spent > cap - 1e-9 else cap - spent

    @property
    def total(self) -> float | None:
        return _sum(self.cost, self.attempt_cost)


def least(*values: float | None) -> float | None:
    """The least of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return min(known) if known else None


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
