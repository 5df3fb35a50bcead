"""Cutting a job into units: ranges of rows."""

from __future__ import annotations

__all__ = ["Rows", "cut", "shard_size", "stream_unit"]

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final

from spider_sdk.config.model import JobConfig
from spider_worker.pipelines.base import UnitSpec

_SMALLEST: Final = 256
_LARGEST: Final = 4096
_WORKERS: Final = 8  #: that might help where the job does not say how many may


@dataclasses.dataclass(frozen=True)
class Rows:
    """A unit's rows, ``stop`` exclusive. Of a ``stream`` (a source of unknown length) the data
    may end before ``stop``, and another unit follows if it does not."""

    start: int
    stop: int
    stream: bool = False

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Rows:
        return cls(int(spec["start"]), int(spec["stop"]), bool(spec.get("stream", False)))


def shard_size(job: JobConfig, rows: int | None, in_flight: int) -> int:
    """Rows in a unit: the job's ``shard_size``, or four units for each worker that may help, but
    enough requests in each to fill the engine (``in_flight``) twice."""
    if job.shard_size is not None:
        return job.shard_size
    samples = job.generation.duplications
    least = max(_SMALLEST, 2 * in_flight)
    if rows is None:
        requests = least
    else:
        share = math.ceil(rows * samples / (4 * (job.parallelism or _WORKERS)))
        requests = max(least, share)
    return max(1, min(_LARGEST, requests) // samples)


def cut(rows: int, size: int) -> list[UnitSpec]:
    """Units over ``rows`` rows. Their ids depend on nothing but their number."""
    return [
        _unit(number, Rows(start, min(start + size, rows)))
        for number, start in enumerate(range(0, rows, size))
    ]


def stream_unit(number: int, start: int, size: int) -> UnitSpec:
    """The ``number``-th unit of a source of unknown length."""
    return _unit(number, Rows(start, start + size, stream=True))


def _unit(number: int, rows: Rows) -> UnitSpec:
    return UnitSpec(f"rows-{number:05d}", number, dataclasses.asdict(rows))
