"""``metrics.jsonl`` while it grows: a record a step, in the unit's journal."""

from __future__ import annotations

__all__ = ["MetricsJournal"]

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spider_worker.pipelines.base import UnitContext
from spider_worker.pipelines.onpolicy_train.record import record_id


class MetricsJournal:
    """The journal of this attempt, beginning with what earlier ones wrote up to ``step``: what
    they did after their last state did not happen. ``last`` is the newest record. Blocking; raises
    LeaseLost when opened."""

    def __init__(self, ctx: UnitContext, step: int) -> None:
        earlier = list(_lines(ctx.previous(), step)) if step else []
        self.path = ctx.open_journal()
        self._file = self.path.open("wb")
        self.last: dict[str, Any] = json.loads(earlier[-1]) if earlier else {}
        self._file.writelines(earlier)
        self._file.flush()
        ctx.publish_journal()

    def add(self, step: int, figures: Mapping[str, Any], *, more: str = "") -> dict[str, Any]:
        """Append a step's record, and return it. ``more`` is added to the id, for a further record
        of that step."""
        record = {"id": record_id(step) + more, "step": step, **figures}
        self._file.write(_encoded(record))
        self._file.flush()
        self.last = record
        return record

    def sync(self) -> None:
        """Down to the disk: no state shall be younger than its metrics."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _encoded(record: Mapping[str, Any]) -> bytes:
    """A line. What is no finite number is null: JSON knows no other word for it."""
    clean = {
        name: None if isinstance(value, float) and value - value != 0.0 else value
        for name, value in record.items()
    }
    return json.dumps(clean, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def _lines(paths: Sequence[Path], step: int) -> list[bytes]:
    """The whole lines up to ``step`` of the newest file that has any. A file that was being
    copied when its writer died is shorter than its predecessor, so the longest wins."""
    best: list[bytes] = []
    for path in paths:
        lines = []
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            if json.loads(line)["step"] <= step:
                lines.append(line)
        if len(lines) >= len(best):
            best = lines
    return best
