"""The off-policy pipeline: prompts from a data set, completions from an engine, records out."""

from __future__ import annotations

__all__ = ["OfflineGenPipeline"]

import asyncio
import contextlib
import time

import orjson

from spider_sdk.config.model import JobConfig, ProcessorConfig
from spider_sdk.config.secrets import without_plain
from spider_sdk.errors import FatalJobError, JobCancelled, NotSupported
from spider_worker.engines.base import Engine
from spider_worker.pipelines.base import (
    JobContext,
    JobResult,
    Plan,
    UnitContext,
    UnitOutcome,
)
from spider_worker.pipelines.calls import announce
from spider_worker.pipelines.offline_gen.feeder import Feeder
from spider_worker.pipelines.offline_gen.parts import Parts
from spider_worker.pipelines.offline_gen.planning import cut, shard_size, stream_unit
from spider_worker.pipelines.offline_gen.pool import RequestPool
from spider_worker.pipelines.offline_gen.post import Backlog
from spider_worker.pipelines.offline_gen.publication import Publication
from spider_worker.pipelines.offline_gen.records import ErrorText
from spider_worker.pipelines.offline_gen.run import GRACE, UnitRun, Workbench
from spider_worker.pipelines.offline_gen.summary import (
    AllRecords,
    no_good_row,
    summarise,
    totals,
)
from spider_worker.pipelines.rows.prompts import Preparer
from spider_worker.pipelines.rows.reader import Reader
from spider_worker.sandbox.base import Sandbox


class OfflineGenPipeline:
    """One job. Raises NotSupported, when made, for what this version cannot honour."""

    grace = GRACE

    def __init__(self, job: JobConfig, parts: Parts) -> None:
        self._job = job
        self._parts = parts
        self._backlog = Backlog()
        self._told: set[tuple[str, str]] = set()
        _refuse(job)

    async def plan(self, ctx: JobContext) -> Plan:
        """Raises FatalJobError and its kin for whatever would fail later: an engine that cannot
        start here, data that cannot be read, a field that is not there, a processor that is
        not defined, a Hub that may not be written to."""
        job = self._job
        await announce(ctx, "job.planning", "checking the engine, the data and the processors")
        await asyncio.to_thread(self._parts.check_engine, job, ctx.secrets)
        engine = self._parts.engine(job, ctx.secrets)
        in_flight = self._parts.in_flight(job, engine)
        await engine.close()
        reader = await self._reader(ctx)
        rows = await reader.call(reader.source.count)
        self._check_columns(await reader.call(reader.source.columns))
        if rows == 0:
            raise FatalJobError(f"source {job.source.dataset!r} selects no rows")
        await self._pre(ctx)
        await self._post(ctx)
        if job.output.mode == "upload_hf":
            await asyncio.to_thread(self._parts.publisher(ctx, {}).check_access)
        size = shard_size(job, rows, in_flight)
        publishes = job.output.mode == "upload_hf"
        return Plan(
            units=[stream_unit(0, 0, size)] if rows is None else cut(rows, size),
            rows_total=None if rows is None else rows * job.generation.duplications,
            publish_every=job.generation.upload_every if publishes else 0,
            publishes=publishes,
        )

    async def run(self, ctx: UnitContext) -> UnitOutcome:
        job = self._job
        pool = await self._pool(ctx)
        reader = await self._reader(ctx)
        preparer = Preparer(job.source.field, job.generation.system_prompt)
        parameters = dict(job.generation.parameters)
        seed = job.generation.seed
        if seed is None and parameters.get("seed") is not None:
            # One seed for all requests would make all samples of a prompt the same.
            seed = int(parameters["seed"])
        bench = Workbench(
            pool=pool,
            reader=reader,
            feeder=Feeder(reader, await self._pre(ctx), preparer, parameters, seed),
            post=await self._post(ctx),
            backlog=self._backlog,
            told=self._told,
            errors=ErrorText(without_plain(ctx.secrets).values()),
            pricing=job.model.pricing,
            samples=job.generation.duplications,
        )
        return await UnitRun(ctx, bench).execute()

    async def publish(self, ctx: JobContext) -> None:
        if self._job.output.mode == "upload_hf":
            # Cancelled while it waited for the Hub: what was committed stands, nothing is lost.
            with contextlib.suppress(JobCancelled):
                await Publication(ctx, self._parts.publisher).push()

    async def finalise(self, ctx: JobContext) -> JobResult:
        """No good row at all is an error; the summary is written all the same."""
        shards = ctx.shards()
        counters = totals(shards)
        good = int(counters.get("rows_ok", 0))
        error = None if good else await asyncio.to_thread(no_good_row, shards, counters)
        remote = await self._finish_hub(ctx, counters) if good else None
        summary = ctx.scratch / "summary.json"
        document = summarise(ctx, counters, remote)
        summary.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
        files = {"summary.json": summary}
        if good and self._job.output.format == "parquet":
            result = ctx.scratch / "result.parquet"
            await asyncio.to_thread(self._parts.write_parquet, AllRecords(shards), result)
            files["result.parquet"] = result
        text = "{:,} rows, {:,} errors, {:,} dropped".format(
            *(int(counters.get(f"rows_{name}", 0)) for name in ("ok", "error", "dropped"))
        )
        return JobResult(remote_artifact=remote, error=error, message=text, files=files)

    async def _finish_hub(self, ctx: JobContext, counters: dict[str, float]) -> str | None:
        if self._job.output.mode != "upload_hf":
            return None
        publication = Publication(ctx, self._parts.publisher)
        await publication.push()
        return await publication.finish(counters)

    # Parts, each built once a runner.

    async def _engine(self, ctx: JobContext) -> Engine:
        loads = self._parts.engine_outlives_job(self._job)

        async def build() -> Engine:
            engine = self._parts.engine(self._job, ctx.secrets)
            try:
                await (self._load(ctx, engine) if loads else engine.start())
            except BaseException:
                await engine.close()
                raise
            return engine

        key = self._parts.engine_key(self._job, ctx.secrets)
        return await ctx.resources.get(
            f"engine:{key}",
            build,
            lambda engine: engine.close(),
            outlives_job=loads,
        )

    async def _load(self, ctx: JobContext, engine: Engine) -> None:
        """Start an engine that may take minutes, and say so."""
        model = self._job.model
        await announce(ctx, "engine.starting", f"{model.provider} loads {model.name}")
        began = time.monotonic()
        await engine.start()
        took = time.monotonic() - began
        data = {"seconds": round(took, 3)}
        await announce(ctx, "engine.ready", f"{model.name} is loaded after {took:.1f} s", data)

    async def _pool(self, ctx: JobContext) -> RequestPool:
        engine = await self._engine(ctx)

        async def build() -> RequestPool:
            return RequestPool(engine, self._parts.in_flight(self._job, engine))

        return await ctx.resources.get(f"pool:{ctx.job_id}", build, lambda pool: pool.close())

    async def _reader(self, ctx: JobContext) -> Reader:
        async def build() -> Reader:
            return Reader(await asyncio.to_thread(self._parts.source, ctx))

        return await ctx.resources.get(f"source:{ctx.job_id}", build, lambda r: r.close())

    async def _pre(self, ctx: JobContext) -> Sandbox | None:
        return await self._sandbox(ctx, self._job.pre_processor, "pre_processor")

    async def _post(self, ctx: JobContext) -> Sandbox | None:
        return await self._sandbox(ctx, self._job.post_processor, "post_processor")

    async def _sandbox(
        self, ctx: JobContext, processor: ProcessorConfig | None, stage: str
    ) -> Sandbox | None:
        if processor is None:
            return None

        async def build() -> Sandbox:
            sandbox = self._parts.sandbox(self._job, processor, stage)
            try:
                await sandbox.start()
            except BaseException:
                await sandbox.stop()
                raise
            return sandbox

        return await ctx.resources.get(f"{stage}:{ctx.job_id}", build, lambda s: s.stop())

    def _check_columns(self, columns: list[str] | None) -> None:
        field = self._job.source.field
        # A pre-processor may make the field; then a row without it is an error row.
        if field is None or columns is None or field in columns or self._job.pre_processor:
            return
        raise FatalJobError(
            f"source.field {field!r} is no column of {self._job.source.dataset!r}; it has"
            f" {', '.join(columns)}"
        )


def _refuse(job: JobConfig) -> None:
    if job.tools:
        raise NotSupported("job.tools: this version generates without tools; remove them")
    hub = job.output.hf
    if job.output.mode == "upload_hf":
        if hub is None:
            raise FatalJobError("output.mode is upload_hf, but output.hf names no repository")
        if hub.repo_type != "dataset":
            raise NotSupported(
                f"output.hf.repo_type {hub.repo_type!r}: off-policy data goes to a repository of"
                " type dataset"
            )
    if job.source.field is None and job.pre_processor is None:
        raise FatalJobError(
            "source.field is not set and there is no pre_processor: nothing says what of a row is"
            " the prompt"
        )
