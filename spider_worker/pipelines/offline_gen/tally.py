"""The counters of a unit, and what they cost."""

from __future__ import annotations

__all__ = ["Tally"]

from spider_sdk.config.model import Pricing
from spider_worker.engines.base import Usage
from spider_worker.pipelines.base import Counters
from spider_worker.pipelines.offline_gen.journal import Spent
from spider_worker.pipelines.offline_gen.ledger import Ledger, State


class Tally:
    """Cumulative over all attempts of the unit. ``cost_usd`` is absent where a price is not
    configured or an endpoint left out its usage; tokens are those that were reported."""

    def __init__(self, ledger: Ledger, pricing: Pricing, spent: Spent) -> None:
        self._ledger = ledger
        self._pricing = pricing
        self._spent = spent
        self._cached = sum(ledger.count(s) for s in (State.OK, State.ERROR, State.DROPPED))

    def used(self, usage: Usage) -> None:
        spent = self._spent
        if usage.prompt_tokens is None or usage.completion_tokens is None:
            spent.unknown += 1
        spent.prompt_tokens += usage.prompt_tokens or 0
        spent.completion_tokens += usage.completion_tokens or 0

    def counters(self) -> Counters:
        ledger, spent = self._ledger, self._spent
        ok, error, dropped = (
            ledger.count(state) for state in (State.OK, State.ERROR, State.DROPPED)
        )
        counters: Counters = {
            "rows_done": ok + error + dropped,
            "rows_ok": ok,
            "rows_error": error,
            "rows_dropped": dropped,
            "rows_cached": self._cached,
            "prompt_tokens": spent.prompt_tokens,
            "completion_tokens": spent.completion_tokens,
        }
        if spent.unknown:
            counters["completions_unpriced"] = spent.unknown
        cost = self._cost()
        if cost is not None:
            counters["cost_usd"] = cost
        return counters

    def _cost(self) -> float | None:
        price_in, price_out = self._pricing.input_per_million, self._pricing.output_per_million
        if price_in is None or price_out is None or self._spent.unknown:
            return None
        spent = self._spent
        return (spent.prompt_tokens * price_in + spent.completion_tokens * price_out) / 1e6
