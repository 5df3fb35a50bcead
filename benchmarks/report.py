"""Figures of the benchmarks: a value, the bar it is held to, and how it compares."""

from __future__ import annotations

__all__ = ["Figure", "table"]

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Figure:
    """``at_least`` True: the value must reach ``bar``; False: it must not exceed it. A ``bar``
    of None is reported beside, and held to nothing."""

    name: str
    value: float
    bar: float | None = None
    at_least: bool = True
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "met": self.met}


def table(figures: Sequence[Figure]) -> str:
    """The figures as Markdown."""
    lines = ["| measure | value | bar | met |", "|---|---|---|---|"]
    for figure in figures:
        bar = "" if figure.bar is None else f"{'≥' if figure.at_least else '≤'} {figure.bar:,g}"
        met = {None: "", True: "yes", False: "**no**"}[figure.met]
        value = f"{figure.value:,.0f}" if figure.value >= 1000 else f"{figure.value:.3g}"
        lines.append(f"| {figure.name} | {value} | {bar} | {met} |")
    return "\n".join(lines)
