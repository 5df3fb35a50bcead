"""Publishing committed shards, and remembering what stands on the Hub."""

from __future__ import annotations

__all__ = ["Publication", "good_records"]

import asyncio
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spider_sdk.records import Record
from spider_worker.pipelines.base import JobContext, ShardFile
from spider_worker.pipelines.offline_gen.journal import LineKind, read_lines
from spider_worker.sinks.base import PublishedShard, Publisher, ShardSource


def good_records(path: Path) -> Iterator[Record]:
    """A shard's records without its error rows, in order, one at a time."""
    for line in read_lines(path):
        if line.kind is LineKind.RECORD and line.document.get("error") is None:
            yield dict(line.document)


class Publication:
    """One turn at publishing. ``build`` makes a publisher from the state of the one before."""

    def __init__(
        self, ctx: JobContext, build: Callable[[JobContext, Mapping[str, Any]], Publisher]
    ) -> None:
        self._ctx = ctx
        state = ctx.load_state()
        entries = state.get("published", [])
        self._published = {entry["number"]: PublishedShard(**entry) for entry in entries}
        self._publisher = build(ctx, state.get("publisher", {}))

    async def push(self) -> None:
        """Push what is committed and complete and not there yet in its present version. Raises
        LeaseLost where somebody else publishes by now, JobCancelled while waiting for the Hub."""
        shards = [_source(shard) for shard in self._ctx.shards() if shard.complete]
        there = {number: shard.version for number, shard in self._published.items()}
        if {shard.number: shard.version for shard in shards} != there:
            pushed = await asyncio.to_thread(self._publisher.publish, shards, self._published)
            self._published = {shard.number: shard for shard in pushed}
            self._save()

    async def finish(self, counters: Mapping[str, float]) -> str:
        """Write the card; returns the repository's URL."""
        url = await asyncio.to_thread(self._publisher.finish, self._published, counters)
        self._save()
        return url

    def _save(self) -> None:
        entries = [dataclasses.asdict(shard) for shard in self._published.values()]
        self._ctx.save_state({"published": entries, "publisher": self._publisher.state()})


def _source(shard: ShardFile) -> ShardSource:
    rows = int(shard.counters.get("rows_ok", 0))
    return ShardSource(shard.number, shard.version, rows, lambda: good_records(shard.path))
