"""The on-policy pipeline: one training run, as one unit of work."""

from __future__ import annotations

__all__ = ["OnPolicyPipeline"]

import asyncio
import dataclasses
import functools
import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from spider_sdk.config.model import JobConfig, OnPolicyOptions, ProcessorConfig, TeacherConfig
from spider_sdk.errors import (
    EngineUnavailable,
    FatalJobError,
    LeaseLost,
    RowError,
    SpiderError,
)
from spider_worker.pipelines.base import (
    JobContext,
    JobResult,
    Plan,
    UnitContext,
    UnitOutcome,
    UnitSpec,
)
from spider_worker.pipelines.calls import Announcer, announce
from spider_worker.pipelines.onpolicy_train.batch import BatchMaker
from spider_worker.pipelines.onpolicy_train.checkpoints import Checkpoints, Progress
from spider_worker.pipelines.onpolicy_train.evaluation import Evaluation
from spider_worker.pipelines.onpolicy_train.finish import (
    closing_files,
    figure_files,
    final_figures,
    published_files,
    summarise,
)
from spider_worker.pipelines.onpolicy_train.journal import MetricsJournal
from spider_worker.pipelines.onpolicy_train.parts import ModelText, Parts, RunTracker
from spider_worker.pipelines.onpolicy_train.prompts import PromptStream, held_out_rows
from spider_worker.pipelines.onpolicy_train.sampling import bias_of, sample_params
from spider_worker.pipelines.onpolicy_train.schedule import LearningRate
from spider_worker.pipelines.onpolicy_train.supervision import Seat, Supervision, choose_signals
from spider_worker.pipelines.onpolicy_train.training import Training, Workbench, as_passing
from spider_worker.pipelines.rows.prompts import Preparer
from spider_worker.pipelines.rows.reader import Reader
from spider_worker.sandbox.base import Sandbox
from spider_worker.tokens import TokenEngine
from spider_worker.trainers.base import Trainer

log = logging.getLogger(__name__)

#: Seconds for a step to end and its checkpoint to be saved, after a cancel.
GRACE: Final = 600.0
UNIT: Final = "train"


class OnPolicyPipeline:
    """One job. Raises NotSupported, when made, for what this version cannot honour."""

    grace = GRACE

    def __init__(self, job: JobConfig, parts: Parts) -> None:
        options = job.generation.on_policy_options
        if options is None:
            raise FatalJobError("generation.on_policy needs on_policy_options with a teacher")
        self._job = job
        self._options: OnPolicyOptions = options
        self._parts = parts
        self._params = sample_params(job, options)

    # -- the contract --------------------------------------------------------------

    async def plan(self, ctx: JobContext) -> Plan:
        """Raises FatalJobError and its kin for whatever would fail later: data, processors, a
        student or a rank that is refused, a teacher that cannot be reached, whose tokenizer
        cannot be mapped or whose scores mean nothing, a Hub that may not be written to, a
        tracker that is not to be had."""
        job, options = self._job, self._options
        await self._warn(ctx)
        await announce(ctx, "job.planning", "checking the data, the student and the teachers")
        given = job.generation.parameters.get("seed")
        asked = _first(options.seed, job.generation.seed, given)
        seed = secrets.randbits(31) if asked is None else int(asked)
        reader = await self._reader(ctx, seed)
        rows = await reader.call(reader.source.count)
        self._check_columns(await reader.call(reader.source.columns))
        if rows == 0:
            raise FatalJobError(f"source {job.source.dataset!r} selects no rows")
        held_out = held_out_rows(rows, options.eval_examples, most=job.source.max_examples)
        self._learning_rate(rows)  # refused before anything is loaded
        await self._sandbox(ctx, job.pre_processor, "pre_processor")
        await self._sandbox(ctx, job.evaluator, "evaluator")
        if job.output.mode == "upload_hf":
            await asyncio.to_thread(self._parts.repo(ctx).check_access)
        # Made to hear whether it is to be had; the run makes its own.
        tracker = await asyncio.to_thread(self._parts.tracker, ctx, None)
        if tracker is not None:
            await asyncio.to_thread(tracker.check)
        if asked is None:
            said = f"the run's seed is {seed}; with generation.seed: {seed} it can be run again"
            await announce(ctx, "train.seed", said, {"seed": seed})
        trainer = await self._trainer(ctx, seed)
        await self._warn_of_idle(ctx, await self._seats(ctx, trainer, test=True))
        trained = None if rows is None else (rows - len(held_out)) * options.epochs
        steps = None if trained is None else math.ceil(trained / options.groups_per_batch)
        spec = {"rows": rows, "held_out": list(held_out), "seed": seed, "steps": steps}
        return Plan(units=[UnitSpec(UNIT, 0, spec)])

    async def run(self, ctx: UnitContext) -> UnitOutcome:
        """What is gone when a run is to go on, or at its very end, may be back for the attempt
        after: it raises PipelineError, and not EngineUnavailable, once there is a step."""
        try:
            return await self._run(ctx)
        except EngineUnavailable as error:
            progress, _ = Checkpoints.progress_of(ctx)
            if progress.step:
                raise as_passing(error) from error
            raise

    async def _run(self, ctx: UnitContext) -> UnitOutcome:
        spec = ctx.unit.spec
        trainer = await self._trainer(ctx, int(spec["seed"]))
        checkpoints = Checkpoints(ctx, trainer, self._parts.save_pace)
        progress = await checkpoints.restore()
        if progress.step:
            text = f"going on after step {progress.step}"
            await announce(ctx, "train.resumed", text, {"step": progress.step})
        announcer = Announcer(ctx)
        journal = await asyncio.to_thread(MetricsJournal, ctx, progress.step)
        tracker = await asyncio.to_thread(
            self._parts.tracker, ctx, progress.step if progress.step else None
        )
        status: str | None = "failed"
        training: Training | None = None
        kept: Mapping[str, Path] = {}
        try:
            if tracker is not None:
                await asyncio.to_thread(tracker.start, journal.path)
            bench = await self._workbench(ctx, trainer, checkpoints, journal, tracker, announcer)
            progress.signals, progress.seed = bench.signals, int(spec["seed"])
            training = Training(ctx, bench, progress)
            progress = await training.execute()
            status = progress.ended or status
            await bench.stream.close()
            if tracker is not None:
                kept = await asyncio.to_thread(tracker.finish, status)
            return await self._outcome(ctx, trainer, journal, progress, kept)
        except LeaseLost:
            status = None  # the tracker's run, too, is another attempt's by now
            raise
        except asyncio.CancelledError:
            # A runner that hears first of a lost lease, or is stopped, cancels the task; another
            # attempt comes after it, but for one whose job was cancelled.
            status = "cancelled" if ctx.cancelled else None
            raise
        except Exception as error:
            # The boundary at which whatever ends a run leaves the figures that lead up to it.
            if training is None:  # which would have kept the step that there is
                await self._leave_adapter(checkpoints, progress, error)
            if tracker is not None:
                kept = {**kept, **await asyncio.to_thread(tracker.finish, status)}
            await self._leave_figures(ctx, checkpoints, journal, kept, error)
            raise
        finally:
            journal.close()
            if tracker is not None:
                await asyncio.to_thread(tracker.finish, status)
            await announcer.finish()

    async def publish(self, ctx: JobContext) -> None:
        """Nothing is published before the end: see ``finalise``."""

    async def finalise(self, ctx: JobContext) -> JobResult:
        progress, _ = Checkpoints.progress_of(ctx)
        figures = await asyncio.to_thread(final_figures, ctx.artifact("metrics.jsonl"))
        published = published_files(ctx, progress)
        uploads = self._job.output.mode == "upload_hf"
        facts = {
            "steps": progress.step,
            "tokens": progress.tokens,
            "ended": progress.ended,
            "seed": progress.seed,
            "checkpoints": progress.saved,
            "signals": progress.signals,
            "files": list(published) if uploads else [],
            "final": figures,
        }
        remote = None
        card = ctx.scratch / "README.md"
        card.write_text(self._parts.card(ctx, facts), encoding="utf-8")
        if uploads:
            pushed = {"README.md": card, **published}
            message = f"On-policy distillation, {progress.step} steps"
            remote = await asyncio.to_thread(self._parts.repo(ctx).push, pushed, message)
        summary = ctx.scratch / "summary.json"
        document = summarise(ctx, progress, figures, remote)
        summary.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
        files = {"summary.json": summary, "adapter/README.md": card}
        said = [f"{progress.step:,} steps", f"{progress.tokens:,} sampled tokens"]
        for name, label in (("kl", "kl"), ("eval/kl", "held-out kl"), ("eval/score", "score")):
            if figures.get(name) is not None:
                said.append(f"{label} {figures[name]:.4f}")
        return JobResult(remote_artifact=remote, message=", ".join(said), files=files)

    # -- a run ---------------------------------------------------------------------

    async def _workbench(
        self,
        ctx: UnitContext,
        trainer: Trainer,
        checkpoints: Checkpoints,
        journal: MetricsJournal,
        tracker: RunTracker | None,
        announcer: Announcer,
    ) -> Workbench:
        job, options, spec = self._job, self._options, ctx.unit.spec
        seats = await self._seats(ctx, trainer, test=False)
        student = await self._student(ctx, trainer)
        supervision = Supervision(
            seats,
            coef=options.kl_penalty_coef,
            discount=options.kl_discount_factor,
            clip=options.advantage_clip,
        )
        stream = PromptStream(
            await self._reader(ctx, int(spec["seed"])),
            await self._sandbox(ctx, job.pre_processor, "pre_processor"),
            Preparer(job.source.field, job.generation.system_prompt),
            rows=spec["rows"],
            held_out=spec["held_out"],
            epochs=options.epochs,
            on_error=functools.partial(_tell_row_error, announcer),
        )
        params = dataclasses.replace(self._params, stop=(*self._params.stop, *student.stops))
        maker = functools.partial(BatchMaker, student, supervision, params, seed=int(spec["seed"]))
        weights = {seat.config.name: seat.config.weight for seat in seats}
        evaluation = Evaluation(
            maker(group_size=1, baseline="none"),
            student,
            params,
            await stream.held_out(),
            weights,
            await self._sandbox(ctx, job.evaluator, "evaluator"),
        )
        return Workbench(
            trainer=trainer,
            stream=stream,
            maker=maker(group_size=options.group_size, baseline=options.baseline),
            evaluation=evaluation,
            checkpoints=checkpoints,
            journal=journal,
            tracker=tracker,
            announcer=announcer,
            options=options,
            teachers=weights,
            signals={seat.config.name: seat.signal for seat in seats},
            tokenizers={seat.config.name: seat.text.vocabulary.name for seat in seats},
            learning_rate=self._learning_rate(spec["rows"]),
            steps_total=spec["steps"],
        )

    def _learning_rate(self, rows: int | None) -> LearningRate:
        """A stream has no more than ``max_examples``. Raises FatalJobError."""
        return LearningRate.of(self._options, _first(rows, self._job.source.max_examples))

    async def _outcome(
        self,
        ctx: UnitContext,
        trainer: Trainer,
        journal: MetricsJournal,
        progress: Progress,
        kept: Mapping[str, Path],
    ) -> UnitOutcome:
        adapter = ctx.scratch / "adapter"
        adapter.mkdir(exist_ok=True)
        await trainer.save_adapter(adapter)
        metrics = ctx.scratch / "records.jsonl"
        await asyncio.to_thread(metrics.write_bytes, journal.path.read_bytes())
        curves = await self._curves(ctx, metrics) if journal.last else None
        return UnitOutcome(
            counters={"steps_done": progress.step, "sampled_tokens": progress.tokens},
            file=metrics,
            complete=progress.ended != "cancelled",
            files={**await asyncio.to_thread(closing_files, adapter, metrics, curves), **kept},
        )

    async def _leave_adapter(
        self, checkpoints: Checkpoints, progress: Progress, why: Exception
    ) -> None:
        """The adapter of the state that this attempt began with, where it does not come to train:
        there may be none after it."""
        try:
            await checkpoints.save_adapter(progress)
        except (OSError, SpiderError) as error:
            why.add_note(f"and the adapter of step {progress.step} could not be saved: {error}")

    async def _leave_figures(
        self,
        ctx: UnitContext,
        checkpoints: Checkpoints,
        journal: MetricsJournal,
        kept: Mapping[str, Path],
        why: Exception,
    ) -> None:
        """Metrics, curves and what the tracker kept as artifacts, where an error ends the attempt.
        What then keeps them from being saved must not hide that error: it becomes a note on it."""
        files = dict(kept)
        try:
            if journal.last:
                metrics = ctx.scratch / "metrics.jsonl"
                await asyncio.to_thread(metrics.write_bytes, journal.path.read_bytes())
                files |= figure_files(metrics, await self._curves(ctx, metrics))
            if files:
                await checkpoints.keep(files)
        except (OSError, SpiderError) as error:
            why.add_note(f"and its figures could not be saved: {error}")

    async def _curves(self, ctx: UnitContext, metrics: Path) -> Path | None:
        png = ctx.scratch / "curves.png"
        try:
            await asyncio.to_thread(self._parts.draw, metrics, png, _title(self._job))
        except Exception as error:
            # The boundary of what is only looked at: the run is worth more than its picture.
            said = f"curves.png could not be drawn: {type(error).__name__}: {error}"
            log.exception("curves.png could not be drawn")
            await asyncio.to_thread(ctx.event, "warning", "train.curves", said)
            return None
        return png

    # -- parts, each built once a runner -------------------------------------------

    async def _trainer(self, ctx: JobContext, seed: int) -> Trainer:
        async def build() -> Trainer:
            trainer = await asyncio.to_thread(self._parts.trainer, ctx, seed)
            said = f"{self._job.model.name} is being loaded; {trainer.info.sampler} samples from it"
            await announce(ctx, "trainer.starting", said, {"sampler": trainer.info.sampler})
            try:
                await trainer.start()
                checkpoint = _first(
                    self._options.student_checkpoint_path, self._job.model.student_checkpoint_path
                )
                # Behind a state there is nothing left of it, and it need not be there any more.
                if checkpoint is not None and not ctx.load_state():
                    await trainer.load_weights(self._parts.checkpoint(ctx, checkpoint))
            except BaseException:
                await trainer.close()
                raise
            return trainer

        return await ctx.resources.get(f"trainer:{ctx.job_id}:{seed}", build, lambda t: t.close())

    async def _student(self, ctx: JobContext, trainer: Trainer) -> ModelText:
        async def build() -> ModelText:
            name = trainer.info.tokenizer
            return await asyncio.to_thread(self._parts.student_text, ctx, name)

        return await ctx.resources.get(f"student:{ctx.job_id}", build, _nothing)

    async def _seats(self, ctx: JobContext, trainer: Trainer, *, test: bool) -> list[Seat]:
        """The teachers, in the order of the config. ``test``: each must show that it can score."""
        student, teachers = await self._student(ctx, trainer), self._options.teacher
        engines = [await self._teacher(ctx, *numbered) for numbered in enumerate(teachers)]
        signals = choose_signals(
            teachers, list(map(self._parts.signals, engines)), trainer.info.dense
        )
        seats = []
        for teacher, engine, signal in zip(teachers, engines, signals, strict=True):
            text = await asyncio.to_thread(self._parts.teacher_text, ctx, teacher)
            if test:
                await self._parts.self_test(engine, text, teacher.name)
                said = f"teacher {teacher.name} scores as it should; signal: {signal}"
                await announce(ctx, "teacher.ready", said, {"teacher": teacher.name})
            seats.append(
                await asyncio.to_thread(
                    Seat.take, teacher, engine, text, student.vocabulary, signal
                )
            )
        return seats

    async def _teacher(self, ctx: JobContext, number: int, teacher: TeacherConfig) -> TokenEngine:
        async def build() -> TokenEngine:
            engine = self._parts.teacher(ctx, teacher)
            await announce(ctx, "teacher.starting", f"teacher {teacher.name} is being reached")
            try:
                await engine.start()
            except BaseException:
                await engine.close()
                raise
            return engine

        key = f"teacher:{ctx.job_id}:{number}"
        return await ctx.resources.get(key, build, lambda engine: engine.close())

    async def _reader(self, ctx: JobContext, seed: int) -> Reader:
        async def build() -> Reader:
            return Reader(await asyncio.to_thread(self._parts.source, ctx, seed))

        return await ctx.resources.get(f"source:{ctx.job_id}", build, lambda r: r.close())

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

    # -- checks --------------------------------------------------------------------

    async def _warn(self, ctx: JobContext) -> None:
        biased = bias_of(self._job)
        if biased:
            said = ", ".join(f"{name} {value}" for name, value in biased.items())
            await asyncio.to_thread(
                ctx.event,
                "warning",
                "train.biased_sampling",
                f"generation.parameters: with {said} the student is sampled from another"
                " distribution than its own, and the KL that it learns from is biased; remove"
                " them unless you mean it",
                biased,
            )

    async def _warn_of_idle(self, ctx: JobContext, seats: Sequence[Seat]) -> None:
        """Of options of the policy gradient that were set and find little to do, since a token that
        has the teacher's distribution learns from that."""
        dense = {seat.config.name: seat.signal for seat in seats if seat.signal != "sampled"}
        asked = {
            name: value
            for name in ("loss_fn", "kl_discount_factor", "advantage_clip", "baseline")
            if (value := getattr(self._options, name)) != getattr(OnPolicyOptions, name)
        }
        if dense and asked:
            said = ", ".join(f"{name} {value}" for name, value in asked.items())
            await asyncio.to_thread(
                ctx.event,
                "warning",
                "train.idle_options",
                f"{said}: holds for the tokens alone that teacher {', '.join(dense)} gives no"
                f" distribution for (signal {', '.join(sorted(set(dense.values())))}); set the"
                " teacher's signal to sampled to have it for all",
                asked,
            )

    def _check_columns(self, columns: list[str] | None) -> None:
        # A pre-processor may make the field; then a row without it is left out.
        if columns is None or self._job.pre_processor:
            return
        named = [("source.field", self._job.source.field)]
        for number, teacher in enumerate(self._options.teacher):
            named += [(f"teacher[{number}].when", column) for column in teacher.when]
        for where, column in named:
            if column is not None and column not in columns:
                raise FatalJobError(
                    f"{where} {column!r} is no column of {self._job.source.dataset!r};"
                    f" it has {', '.join(columns)}"
                )


def _tell_row_error(announcer: Announcer, index: int, error: RowError) -> None:
    announcer.say(
        "warning",
        "row.error",
        f"row {index} makes no prompt and is left out: {error.message} (further ones are counted"
        " as rows_error)",
        {"row": index},
    )


def _title(job: JobConfig) -> str:
    options = job.generation.on_policy_options
    teachers = [teacher.name for teacher in options.teacher] if options else []
    student, *others = (
        Path(name).name if Path(name).is_absolute() else name
        for name in (job.model.name, *teachers)
    )
    return f"{student} ← {', '.join(others)}"


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


async def _nothing(_: Any) -> None: ...
