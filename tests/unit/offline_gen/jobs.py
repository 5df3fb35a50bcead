"""Jobs over fakes, for the tests beside this module."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spider_sdk.config.model import (
    GenerationConfig,
    JobConfig,
    ModelConfig,
    OutputConfig,
    Pricing,
    ProcessorConfig,
    SourceConfig,
)
from spider_worker.engines.base import Engine
from spider_worker.pipelines.offline_gen.pipeline import OfflineGenPipeline
from spider_worker.sinks.base import Publisher
from spider_worker.sources.base import Source
from spider_worker.testing import (
    FakeEngine,
    InMemorySource,
    LocalContext,
    LocalResult,
    LocalStore,
    fake_parts,
    run_job_locally,
)


def rows(count: int) -> list[dict[str, Any]]:
    return [{"question": f"q{index}", "number": index} for index in range(count)]


@dataclasses.dataclass
class Setup:
    """A job and its parts; ``go`` runs it, again in the same folder to go on."""

    root: Path
    source: Source = dataclasses.field(default_factory=lambda: InMemorySource(rows(10)))
    engine: Engine = dataclasses.field(default_factory=FakeEngine)
    pre: Callable[..., Any] | None = None
    post: Callable[..., Any] | None = None
    publisher: Publisher | None = None
    generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
    output: OutputConfig = dataclasses.field(default_factory=OutputConfig)
    field: str | None = "question"
    shard_size: int | None = 4
    pricing: Pricing = dataclasses.field(default_factory=Pricing)
    secrets: dict[str, str] = dataclasses.field(default_factory=dict)

    def job(self) -> JobConfig:
        processor = ProcessorConfig(name="f", source="")
        return JobConfig(
            model=ModelConfig(provider="vllm", name="fake", pricing=self.pricing),
            source=SourceConfig(dataset="memory", field=self.field),
            generation=self.generation,
            output=self.output,
            pre_processor=processor if self.pre else None,
            post_processor=processor if self.post else None,
            shard_size=self.shard_size,
        )

    def pipeline(self) -> OfflineGenPipeline:
        parts = fake_parts(
            self.source, self.engine, pre=self.pre, post=self.post, publisher=self.publisher
        )
        return OfflineGenPipeline(self.job(), parts)

    def context(self) -> LocalContext:
        return LocalContext(LocalStore(self.root), self.job(), secrets=self.secrets)

    async def run(self, *, retry: bool = False, ctx: LocalContext | None = None) -> LocalResult:
        return await run_job_locally(self.pipeline(), ctx or self.context(), retry=retry)

    def go(self, *, retry: bool = False) -> LocalResult:
        return asyncio.run(self.run(retry=retry))
