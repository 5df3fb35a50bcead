"""What an instance costs: dollars and tokens, of earlier attempts and of the one under way."""

from __future__ import annotations

__all__ = ["Spent"]

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass
class Spent:
    """Dollars are None where they are unknown. ``this_life`` is what the attempts of this life of
    the job have cost, ``this_claim`` those of this claim of the unit."""

    cost: float | None = 0.0
    prompt: int = 0
    completion: int = 0
    this_life: float | None = 0.0
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
        self.this_life = _sum(self.this_life, self.attempt_cost)
        self.this_claim = _sum(self.this_claim, self.attempt_cost)
        self.prompt += self.attempt_prompt
        self.completion += self.attempt_completion
        self.now(0.0, 0, 0)

    def add_record(self, record: Mapping[str, Any], *, this_life: bool) -> None:
        """An attempt of an earlier claim."""
        metrics = record["metrics"]
        usage = metrics.get("accumulated_token_usage") or {}
        self.cost = _sum(self.cost, metrics.get("accumulated_cost"))
        if this_life:
            self.this_life = _sum(self.this_life, metrics.get("accumulated_cost"))
        self.prompt += usage.get("prompt_tokens", 0)
        self.completion += usage.get("completion_tokens", 0)

    def begin_life(self) -> None:
        """The job was retried: what was spent before has no part in its caps."""
        self.this_life = self.this_claim = 0.0

    def left(self, cap: float | None, grant: float | None) -> float | None:
        """Of an instance's cap and its claim's grant, what there is for another attempt: 0.0 also
        where nobody knows what was spent. None: neither is there."""
        left = [
            _left(whole, _sum(spent, self.attempt_cost))
            for whole, spent in ((cap, self.this_life), (grant, self.this_claim))
            if whole is not None
        ]
        return min(left, default=None)

    @property
    def total(self) -> float | None:
        return _sum(self.cost, self.attempt_cost)


def _left(cap: float, spent: float | None) -> float:
    # A sum of prices misses a cap that it reaches by less than this.
    return 0.0 if spent is None or spent > cap - 1e-9 else cap - spent


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
