"""Sequences of several lengths as one array."""

from __future__ import annotations

__all__ = ["padded"]

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def padded(rows: Sequence[Sequence[int] | NDArray[np.int64]]) -> NDArray[np.int64]:
    """(B, T) of B ≥ 1 rows, the shorter ones with zeros behind them."""
    whole = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for number, row in enumerate(rows):
        whole[number, : len(row)] = row
    return whole
