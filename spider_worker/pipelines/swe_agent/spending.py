"""What an instance costs: dollars and tokens, of earlier attempts and of the one under way."""

from __future__ import annotations

__all__ = ["Spent"]

import dataclasses
from collections.abc import Mapping
from typing import Any

from spider_worker.trajectories.record import charge_of


@dataclasses.dataclass
class Spent:
    """A cost in dollars is None where it is unknown. Against caps on money such an attempt counts
    with all that it was ``allowed`` (None: no cap): in ``charged``, which is of all attempts, in
    ``this_life`` of the job and in ``this_claim`` of the unit."""

    cost: float | None = 0.0
    prompt: int = 0
    completion: int = 0
    charged: float = 0.0
    this_life: float = 0.0
    this_claim: float = 0.0
    allowed: float | None = None  #: of the attempt under way, as what follows
    attempt_cost: float | None = 0.0
    attempt_prompt: int = 0
    attempt_completion: int = 0
    turns: int = 0

    def now(self, cost: float | None, prompt: int, completion: int) -> None:
        self.attempt_cost, self.attempt_prompt, self.attempt_completion = cost, prompt, completion

    def settle(self) -> None:
        """The attempt has ended: it counts among the earlier ones."""
        self.cost = _sum(self.cost, self.attempt_cost)
        self.charged += self._charge
        self.this_life += self._charge
        self.this_claim += self._charge
        self.prompt += self.attempt_prompt
        self.completion += self.attempt_completion
        self.now(0.0, 0, 0)

    def add_record(self, record: Mapping[str, Any], *, this_life: bool) -> None:
        """An attempt of an earlier claim."""
        metrics = record["metrics"]
        usage = metrics.get("accumulated_token_usage") or {}
        charge = charge_of(metrics)
        self.cost = _sum(self.cost, metrics.get("accumulated_cost"))
        self.charged += charge
        if this_life:
            self.this_life += charge
        self.prompt += usage.get("prompt_tokens", 0)
        self.completion += usage.get("completion_tokens", 0)

    def begin_life(self) -> None:
        """The job was retried: what was spent before has no part in its caps."""
        self.this_life = self.this_claim = 0.0

    def left(self, cap: float | None, grant: float | None) -> float | None:
        """Of an instance's cap and its claim's grant, what there is for another attempt. None:
        neither is there."""
        left = [
            _left(whole, spent + self._charge)
            for whole, spent in ((cap, self.this_life), (grant, self.this_claim))
            if whole is not None
        ]
        return min(left, default=None)

    @property
    def total(self) -> float | None:
        return _sum(self.cost, self.attempt_cost)

    @property
    def charge(self) -> float:
        """What all attempts count with where there is a cap on money."""
        return self.charged + self._charge

    @property
    def _charge(self) -> float:
        return (self.allowed or 0.0) if self.attempt_cost is None else self.attempt_cost


def _left(cap: float, spent: float) -> float:
    # A sum of prices misses a cap that it reaches by less than this.
    return 0.0 if spent > cap - 1e-9 else cap - spent


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
