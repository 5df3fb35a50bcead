"""``python -m spider_worker.export SOURCE.jsonl TARGET.parquet``: records as Parquet.

A program of its own because the API runs it: building a table takes seconds of CPU, which a
process that serves hundreds of streams must not spend itself.
"""

from __future__ import annotations

__all__ = ["export", "main"]

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from spider_sdk.records import Record
from spider_worker.sinks.parquet import write_parquet


class _Records:
    """The records of a JSONL file, to be gone through as often as need be."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator[Record]:
        with self._path.open("rb") as file:
            for line in file:
                record: dict[str, Any] = orjson.loads(line)
                yield record


def export(source: Path, target: Path) -> int:
    """Write ``target``, whole or not at all; returns the number of rows."""
    return write_parquet(_Records(source), target)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m spider_worker.export SOURCE.jsonl TARGET.parquet\n")
        return 2
    export(Path(arguments[0]), Path(arguments[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
