"""Records as JSON Lines or as one JSON array, streamed."""

from __future__ import annotations

__all__ = ["dump_record", "write_json", "write_jsonl"]

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from spider_sdk.records import Record
from spider_worker.sinks.atomic import atomic_path

_BUFFER = 1 << 20


def dump_record(value: Any) -> bytes:
    """Compact UTF-8 JSON without a newline; NaN and the infinities become null.

    What orjson cannot take (integers beyond 64 bits, lone surrogates in text) goes through
    the standard library, with such text escaped. Raises TypeError for what no JSON can hold.
    """
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False).encode()


def _finite(value: Any) -> Any:
    """``value`` with None for floats that JSON has no word for, as orjson writes them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def write_jsonl(records: Iterable[Record], path: Path) -> int:
    """One record a line, in the order given; returns their number. Atomic."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("wb", buffering=_BUFFER) as file:
        for record in records:
            file.write(dump_record(record) + b"\n")
            count += 1
    return count


def write_json(records: Iterable[Record], path: Path) -> int:
    """One JSON array, a record a line; returns their number. Atomic."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("wb", buffering=_BUFFER) as file:
        file.write(b"[")
        for record in records:
            file.write((b",\n" if count else b"\n") + dump_record(record))
            count += 1
        file.write(b"\n]\n")
    return count
