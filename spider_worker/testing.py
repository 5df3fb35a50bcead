"""Fakes of every part, for tests of whoever builds on Spider, and for its own."""

from __future__ import annotations

__all__ = [
    "FakeEngine",
    "FakePublisher",
    "FakeSandbox",
    "InMemorySource",
    "LocalContext",
    "LocalResult",
    "LocalStore",
    "fake_parts",
    "run_job_locally",
]

import asyncio
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from spider_sdk.config.model import JobConfig, ProcessorConfig
from spider_sdk.errors import AuthError, FatalJobError, RowError
from spider_sdk.records import Record
from spider_worker.engines.base import (
    Completion,
    Engine,
    EngineInfo,
    EngineStats,
    SamplingParams,
    Usage,
)
from spider_worker.pipelines.local import LocalContext, LocalResult, LocalStore, run_job_locally
from spider_worker.pipelines.offline_gen.parts import Parts
from spider_worker.sandbox.base import Outcome, Sandbox
from spider_worker.sinks.base import PublishedShard, Publisher, ShardSource
from spider_worker.sources.base import IndexedRow, Row, Source

Messages = Sequence[Mapping[str, Any]]


def _echo(messages: Messages, params: SamplingParams) -> str:  # noqa: ARG001
    return f"echo: {messages[-1]['content']}"


class FakeEngine:
    """Answers by ``script``: a function of messages and parameters that returns a text or a
    Completion, or raises. ``latency`` is in seconds (0: without a pause), a number or a function
    of the messages. ``asked`` keeps the last message of every request where ``keep`` is set;
    ``peak`` the most requests there were in flight.
    """

    def __init__(
        self,
        script: Callable[[Messages, SamplingParams], str | Completion] = _echo,
        *,
        capacity: int = 64,
        latency: float | Callable[[Messages], float] = 0.0,
        keep: bool = True,
    ) -> None:
        self._script = script
        self._latency = latency
        self._info = EngineInfo("fake", capacity)
        self._keep = keep
        self.asked: list[str] = []
        self.params: list[SamplingParams] = []
        self.in_flight = 0
        self.peak = 0
        self.started = 0
        self.closed = 0

    @property
    def info(self) -> EngineInfo:
        return self._info

    def stats(self) -> EngineStats:
        return EngineStats(self.in_flight, self._info.capacity)

    async def start(self) -> None:
        self.started += 1

    async def complete(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]],  # noqa: ARG002 - the contract's
        params: SamplingParams,
    ) -> Completion:
        if self._keep:
            self.asked.append(str(messages[-1]["content"]))
            self.params.append(params)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            latency = self._latency
            seconds = latency if isinstance(latency, int | float) else latency(messages)
            if seconds:
                await asyncio.sleep(seconds)
            answer = self._script(messages, params)
        finally:
            self.in_flight -= 1
        if isinstance(answer, Completion):
            return answer
        words = sum(len(str(message["content"]).split()) for message in messages)
        return Completion(answer, "stop", Usage(words, len(answer.split())))

    async def close(self) -> None:
        self.closed += 1


class InMemorySource:
    """Rows of a list, or of a function of the index with a ``count``. ``stream`` hides how many
    there are; ``opened`` counts the starts of reads."""

    def __init__(
        self,
        rows: Sequence[Row] | Callable[[int], Row],
        count: int | None = None,
        *,
        stream: bool = False,
    ) -> None:
        if callable(rows):
            if count is None:
                raise ValueError("a function of the index needs a count")
            self._row, self._count = rows, count
        else:
            self._row, self._count = rows.__getitem__, len(rows)
        self._stream = stream
        self.opened: list[tuple[int, int | None]] = []
        self.closed = 0

    def count(self) -> int | None:
        return None if self._stream else self._count

    def columns(self) -> list[str] | None:
        return None if self._stream or not self._count else list(self._row(0))

    def batches(self, start: int, stop: int | None, size: int = 256) -> Iterator[list[IndexedRow]]:
        self.opened.append((start, stop))
        end = self._count if stop is None else min(stop, self._count)
        for first in range(start, end, size):
            yield [(index, self._row(index)) for index in range(first, min(first + size, end))]

    def close(self) -> None:
        self.closed += 1


class FakeSandbox:
    """Calls ``function`` in this process: no isolation, no limits."""

    def __init__(
        self, function: Callable[..., Any], stage: str, *, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self._function = function
        self._stage = stage
        self._kwargs = dict(kwargs or {})
        self.calls: list[int] = []
        self.running = False

    async def start(self) -> None:
        self.running = True

    async def call(self, rows: Sequence[dict[str, Any]]) -> list[Outcome]:
        if not self.running:
            raise FatalJobError("the sandbox was not started")
        self.calls.append(len(rows))
        await asyncio.sleep(0)
        return [self._one(orjson.loads(orjson.dumps(row))) for row in rows]

    async def stop(self) -> None:
        self.running = False

    def _one(self, row: dict[str, Any]) -> Outcome:
        try:
            return Outcome(orjson.loads(orjson.dumps(self._function(row, **self._kwargs))))
        except Exception as error:  # noqa: BLE001 - what the user's function raises is its outcome
            trace = traceback.format_exc()
            kind = type(error).__name__
            return Outcome(None, RowError(str(error), stage=self._stage, kind=kind, trace=trace))


class FakePublisher:
    """A repository in memory: ``files`` by path, ``commits`` by what each wrote."""

    def __init__(self, *, allowed: bool = True) -> None:
        self._allowed = allowed
        self.files: dict[str, list[Record]] = {}
        self.commits: list[list[str]] = []
        self.card: Mapping[str, Any] | None = None

    def check_access(self) -> None:
        if not self._allowed:
            raise AuthError("the token may not write to this repository; use one that may")

    def publish(
        self, shards: Sequence[ShardSource], published: Mapping[int, PublishedShard]
    ) -> list[PublishedShard]:
        result, wrote = [], []
        for shard in shards:
            there = published.get(shard.number)
            if there is None or there.version != shard.version:
                good = [record for record in shard if record.get("error") is None]
                path = f"data/train-{shard.number:05d}.parquet" if good else ""
                digest = "0" * 64 if good else ""
                there = PublishedShard(shard.number, shard.version, path, len(good), digest)
                if good:
                    self.files[path] = good
                    wrote.append(path)
            result.append(there)
        if wrote:
            self.commits.append(wrote)
        return result

    def state(self) -> dict[str, Any]:
        return {"commits": len(self.commits)}

    def finish(self, published: Mapping[int, PublishedShard], summary: Mapping[str, Any]) -> str:
        wanted = {shard.path for shard in published.values()}
        self.files = {path: rows for path, rows in self.files.items() if path in wanted}
        self.card = summary
        return "https://hub.invalid/datasets/fake"


def fake_parts(
    source: Source,
    engine: Engine,
    *,
    pre: Callable[..., Any] | None = None,
    post: Callable[..., Any] | None = None,
    publisher: Publisher | None = None,
) -> Parts:
    """Parts of a pipeline made of fakes. A job that names a processor gets ``pre`` or ``post``;
    ``write_parquet`` writes JSON Lines."""

    def sandbox(job: JobConfig, processor: ProcessorConfig, stage: str) -> Sandbox:  # noqa: ARG001
        function = pre if stage == "pre_processor" else post
        if function is None:
            raise FatalJobError(f"{stage}: {processor.name} is not defined")
        return FakeSandbox(function, stage, kwargs=processor.kwargs)

    hub: Publisher = publisher or FakePublisher()
    return Parts(
        engine=lambda job, secrets: engine,  # noqa: ARG005
        check_engine=lambda job, secrets: None,  # noqa: ARG005
        engine_key=lambda job, secrets: "fake",  # noqa: ARG005
        engine_outlives_job=lambda job: True,  # noqa: ARG005
        in_flight=lambda job, engine: min(
            engine.info.capacity, job.generation.max_batch_size or engine.info.capacity
        ),
        source=lambda ctx: source,  # noqa: ARG005
        sandbox=sandbox,
        publisher=lambda ctx, state: hub,  # noqa: ARG005
        write_parquet=_write_lines,
    )


def _write_lines(records: Iterable[Record], path: Path) -> None:
    with path.open("wb") as file:
        file.writelines(orjson.dumps(record) + b"\n" for record in records)
