"""User functions for the demo: they run in a sandbox on the worker, one call a row."""

from __future__ import annotations

import re
from typing import Any

NUMBER = re.compile(r"\d+")


def ask(row: dict[str, Any]) -> str | None:
    """Pre-processor: the prompt for one row of prompts.jsonl; None would drop the row."""
    if len(NUMBER.findall(row["question"])) != 2:
        return None
    return str(row["question"])


def check_sum(row: dict[str, Any]) -> dict[str, Any]:
    """Post-processor: add ``expected`` and ``correct`` to the record of one completion."""
    first, second = NUMBER.findall(row["question"])
    expected = int(first) + int(second)
    return {**row, "expected": expected, "correct": row["completion"].strip() == str(expected)}


def score_sum(row: dict[str, Any]) -> bool:
    """Evaluator: whether the completion names the sum of a question of sums.jsonl, last digit
    first, and says nothing else."""
    first, second = NUMBER.findall(row["question"])
    return bool(row["completion"] == f"It is {str(int(first) + int(second))[::-1]}.")
