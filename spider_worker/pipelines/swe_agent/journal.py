"""The journal of an instance: what it has said and cost so far, line by line.

A runner may be killed at any moment, and what an agent has done until then is a trajectory, if a
partial one, and was paid for. Lines are the agent's own (``spider_agent.lines``), between one that
says which attempt begins and one that holds its record, with a line for each call of the model.
The record is there before it is judged; the verdict is a line of its own. A line says which life of
the job (see ``UnitContext``) the attempts after it belong to; those before it are of earlier ones.
"""

from __future__ import annotations

__all__ = ["Journal", "Past", "read_past"]

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from spider_worker.agents.episode import Heard
from spider_worker.trajectories.record import judged


@dataclasses.dataclass
class Past:
    """What earlier attempts left. ``records`` are those that ended, of which the first
    ``committed`` stand in a shard. ``life`` is the job's in which the last were made (None: not
    known); the first ``earlier`` belong to those before it. ``unfinished`` is the one that was cut
    off with its worker (None: none was). ``attempt`` is the last one's number, ``allowed`` what the
    unfinished one might spend (None: no cap), ``cost`` and ``tokens`` what it had spent."""

    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    committed: int = 0
    life: int | None = None
    earlier: int = 0
    unfinished: Heard | None = None
    attempt: int = 0
    allowed: float | None = None
    cost: float | None = 0.0
    tokens: tuple[int, int] = (0, 0)


class Journal:
    """Whole lines, in the file by the time that the call returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def take_over(self, past: Past) -> None:
        """Hold what earlier journals held; the unfinished attempt is the caller's to end."""
        lines: list[dict[str, Any]] = [
            {"op": "committed" if number < past.committed else "record", "record": record}
            for number, record in enumerate(past.records)
        ]
        if past.life is not None:
            lines.insert(past.earlier, {"op": "life", "life": past.life})
        for line in lines:
            self._write(line)

    def live(self, life: int) -> None:
        """What follows belongs to this life of the job."""
        self._write({"op": "life", "life": life})

    def begin(self, attempt: int, allowed: float | None) -> None:
        """``allowed``: dollars that it may spend; None: no cap."""
        self._write({"op": "attempt", "attempt": attempt, "allowed": allowed})

    def hear(self, line: Mapping[str, Any]) -> None:
        self._write(line)

    def spend(self, cost: float | None, prompt_tokens: int, completion_tokens: int) -> None:
        """What the attempt has cost so far, in all."""
        self._write({"op": "cost", "cost": cost, "tokens": [prompt_tokens, completion_tokens]})

    def end(self, record: Mapping[str, Any]) -> None:
        self._write({"op": "record", "record": record})
        os.fsync(self._file.fileno())

    def verdict(self, report: Mapping[str, Any]) -> None:
        """What the judge says of the last record."""
        self._write({"op": "verdict", "report": report})
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(orjson.dumps(line) + b"\n")


def read_past(files: Iterable[Path]) -> Past:
    """What journals and shards, oldest first, say of earlier attempts; each file holds all that
    the one before it did. A torn last line is left out."""
    past = Past()
    for file in files:
        past = Past()
        for line in file.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                _take(past, orjson.loads(line))
    return past


def _take(past: Past, line: Mapping[str, Any]) -> None:
    match line.get("op"):
        case None | "committed":  # a shard's line is a record
            record = dict(line.get("record", line))
            past.records.append(record)
            past.committed = past.earlier = len(past.records)
            past.attempt = record["attempt"]
        case "life":
            past.life, past.earlier = line["life"], len(past.records)
        case "attempt":
            past.unfinished, past.attempt = Heard(), line["attempt"]
            past.allowed, past.cost, past.tokens = line.get("allowed"), 0.0, (0, 0)
        case "cost":
            past.cost, past.tokens = line["cost"], (line["tokens"][0], line["tokens"][1])
        case "record":
            past.records.append(line["record"])
            past.attempt = line["record"]["attempt"]
            past.unfinished, past.cost, past.tokens = None, 0.0, (0, 0)
        case "verdict":
            report = line["report"]
            past.records[-1] = judged(past.records[-1], report.get("resolved"), report)
        case _:
            if past.unfinished is not None:
                past.unfinished.take(line)
