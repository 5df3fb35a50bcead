"""The output tree of a job, made of the records of its units."""

from __future__ import annotations

__all__ = ["Tally", "gather", "said"]

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from spider_worker.pipelines.base import ShardFile


@dataclasses.dataclass
class Tally:
    """How many runs of instances ended how; ``cost`` in dollars is that of every attempt, None
    where one's is unknown."""

    statuses: Counter[str] = dataclasses.field(default_factory=Counter)
    resolved: int = 0
    judged: int = 0
    cost: float | None = 0.0

    @property
    def runs(self) -> int:
        return sum(self.statuses.values())


def gather(shards: Iterable[ShardFile], output: Path) -> Tally:
    """Write ``output.jsonl``: every attempt's record, the last one of a run last."""
    tally = Tally()
    with output.open("wb") as file:
        for shard in shards:
            last: dict[str, Any] | None = None
            for line in shard.path.read_bytes().splitlines():
                last = orjson.loads(line)
                assert last is not None
                file.write(line + b"\n")
                cost = last["metrics"].get("accumulated_cost")
                tally.cost = None if cost is None or tally.cost is None else tally.cost + cost
            if last is not None:
                tally.statuses[last["status"]] += 1
                tally.judged += last["resolved"] is not None
                tally.resolved += last["resolved"] is True
    return tally


def said(tally: Tally) -> str:
    """The tally in a line."""
    parts = [
        f"{count} {status.replace('_', ' ')}" for status, count in tally.statuses.most_common()
    ]
    if tally.judged:
        parts.append(f"{tally.resolved} of {tally.judged} judged are resolved")
    if tally.cost is not None:
        parts.append(f"${tally.cost:.2f}")
    return ", ".join(parts) or "no instance was run"


def write_metadata(metadata: dict[str, Any], path: Path) -> Path:
    path.write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
