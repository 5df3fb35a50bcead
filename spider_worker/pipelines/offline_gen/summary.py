"""What a finished job says of itself: its totals, its recipe, and what went wrong."""

from __future__ import annotations

__all__ = ["AllRecords", "error_samples", "no_good_row", "summarise", "totals"]

import itertools
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from spider_sdk.records import Record
from spider_worker.pipelines.base import COUNTERS, Counters, JobContext, ShardFile
from spider_worker.pipelines.offline_gen.journal import LineKind, read_lines

_LOOKED_AT = 10_000  # records, for errors to name
_PACKAGES = ("spider-distill", "datasets", "huggingface_hub", "torch", "transformers", "vllm")


def totals(shards: Sequence[ShardFile]) -> Counters:
    """Sums over units; ``cost_usd`` only where each unit knows its own."""
    sums: Counters = {}
    for name in COUNTERS:
        values = [shard.counters[name] for shard in shards if name in shard.counters]
        if values and (name != "cost_usd" or len(values) == len(shards)):
            sums[name] = sum(values)
    return sums


def summarise(ctx: JobContext, counters: Mapping[str, float], remote: str | None) -> dict[str, Any]:
    """The document ``summary.json``: ``job`` is the recipe as submitted, without secrets."""
    return {
        "job_id": ctx.job_id,
        "job": dict(ctx.document),
        "counters": {name: counters.get(name) for name in COUNTERS if name != "rows_total"},
        "remote_artifact": remote,
        "versions": {"python": platform.python_version(), **_versions()},
    }


class AllRecords:
    """Every record, error rows included, in order, one at a time; as often as asked."""

    def __init__(self, shards: Sequence[ShardFile]) -> None:
        self._shards = shards

    def __iter__(self) -> Iterator[Record]:
        for shard in self._shards:
            for line in read_lines(shard.path):
                if line.kind is LineKind.RECORD:
                    yield dict(line.document)


def no_good_row(shards: Sequence[ShardFile], counters: Mapping[str, float]) -> str:
    """Why a job without a single good row failed."""
    errors = int(counters.get("rows_error", 0))
    dropped = int(counters.get("rows_dropped", 0))
    if not errors and not dropped:
        return "the source had no rows"
    if not errors:
        return f"no good row: the processors dropped all {dropped}"
    lines = [f"no good row: {errors} failed and {dropped} were dropped. Errors seen:"]
    return "\n".join([*lines, *(f"- {text}" for text in error_samples(shards))])


def error_samples(shards: Sequence[ShardFile], most: int = 3) -> list[str]:
    """The first few distinct errors, with the first row that has each."""
    seen: dict[tuple[str, str], str] = {}
    for record in itertools.islice(AllRecords(shards), _LOOKED_AT):
        error = record.get("error")
        if not isinstance(error, Mapping):
            continue
        key = (str(error.get("type")), str(error.get("message")))
        seen.setdefault(key, f"{error.get('stage')}: {key[0]}: {key[1]} (row {record['id']})")
        if len(seen) == most:
            break
    return list(seen.values())


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
