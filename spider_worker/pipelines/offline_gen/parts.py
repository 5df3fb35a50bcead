"""The parts that the pipeline is put together from, each behind a function that builds it."""

from __future__ import annotations

__all__ = ["Parts"]

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from spider_sdk.config.model import JobConfig, ProcessorConfig
from spider_sdk.records import Record
from spider_worker.engines.base import Engine
from spider_worker.pipelines.base import JobContext
from spider_worker.sandbox.base import Sandbox
from spider_worker.sinks.base import Publisher
from spider_worker.sources.base import Source

Secrets = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Parts:
    """``engine`` makes an engine that is not started yet; ``check_engine`` raises what would keep
    it from starting here; ``engine_key`` is equal for jobs that may share one, and
    ``engine_outlives_job`` says whether they do. ``in_flight`` is how many requests to keep with
    an engine (of one that has not started: about how many).
    ``sandbox`` takes the stage (``pre_processor`` or ``post_processor``) last. ``publisher`` takes
    what ``state()`` of the job's last one gave. ``write_parquet`` goes through the records as
    often as it needs. ``check_engine``, ``source`` and ``write_parquet`` may block."""

    engine: Callable[[JobConfig, Secrets], Engine]
    check_engine: Callable[[JobConfig, Secrets], None]
    engine_key: Callable[[JobConfig, Secrets], str]
    engine_outlives_job: Callable[[JobConfig], bool]
    in_flight: Callable[[JobConfig, Engine], int]
    source: Callable[[JobContext], Source]
    sandbox: Callable[[JobConfig, ProcessorConfig, str], Sandbox]
    publisher: Callable[[JobContext, Mapping[str, Any]], Publisher]
    write_parquet: Callable[[Iterable[Record], Path], object]
