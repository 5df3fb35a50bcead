"""What a tree holds, in a table."""

from __future__ import annotations

__all__ = ["Summary", "counted", "dollars", "summary"]

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from spider_worker.trajectories.output_file import Index
from spider_worker.trajectories.record import STATUSES


@dataclasses.dataclass(frozen=True)
class Summary:
    """The runs of an ``output.jsonl`` by status, each with the numbers of all, of judged and of
    resolved ones. ``cost`` is in dollars over all attempts (None: unknown), ``unpriced`` the
    number of attempts whose cost is unknown."""

    statuses: Mapping[str, tuple[int, int, int]]
    cost: float | None
    unpriced: int

    @property
    def total(self) -> tuple[int, int, int]:
        columns = list(zip(*self.statuses.values(), strict=True)) or [(0,)] * 3
        runs, judged, resolved = (sum(column) for column in columns)
        return runs, judged, resolved

    def lines(self) -> list[str]:
        if not self.statuses:
            return ["no instance has come to an end"]
        width = max(map(len, ("status", "all", *self.statuses)))
        lines = [f"{'status':<{width}}   runs  judged  resolved"]
        lines += [_line(status, width, *counts) for status, counts in self.statuses.items()]
        lines.append(_line("all", width, *self.total))
        cost = dollars(self.cost, self.unpriced)
        return [*lines, *([f"cost: {cost}"] if cost else [])]

    def to_json(self) -> dict[str, Any]:
        runs, judged, resolved = self.total
        return {
            "runs": runs,
            "judged": judged,
            "resolved": resolved,
            "statuses": {
                status: dict(zip(("runs", "judged", "resolved"), counts, strict=True))
                for status, counts in self.statuses.items()
            },
            "cost_usd": self.cost,
            "attempts_of_unknown_cost": self.unpriced,
        }


def summary(index: Index) -> Summary:
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for entry in index.latest.values():
        row = counts[entry.status]
        row[0] += 1
        row[1] += entry.resolved is not None
        row[2] += entry.resolved is True
    order = [*STATUSES, *sorted(counts.keys() - STATUSES.keys())]
    statuses = {name: _three(counts[name]) for name in order if name in counts}
    return Summary(statuses, *index.cost())


def counted(number: int, word: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def dollars(cost: float | None, unpriced: int) -> str:
    """ "" where nothing is known."""
    if cost is None:
        return ""
    more = f", and {counted(unpriced, 'attempt')} of unknown cost"
    return f"${cost:.2f}" + (more if unpriced else "")


def _three(row: list[int]) -> tuple[int, int, int]:
    runs, judged, resolved = row
    return runs, judged, resolved


def _line(name: str, width: int, runs: int, judged: int, resolved: int) -> str:
    shown = f"{resolved:>8}" if judged else f"{'-':>8}"
    return f"{name.replace('_', ' '):<{width}}  {runs:>5}  {judged:>6}  {shown}"
