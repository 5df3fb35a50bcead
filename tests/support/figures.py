"""Figures that tests of faults measure on their way, kept where ``make chaos`` says."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path


def keep(fault: str, **figures: float) -> None:
    """Append a line to the file that SPIDER_FIGURES names; without it, nothing is kept."""
    if path := os.environ.get("SPIDER_FIGURES"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"fault": fault, **figures}) + "\n")


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of ``values`` lie; no interpolation."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]
