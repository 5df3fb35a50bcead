"""The loop: a batch is sampled and scored, the student learns from it, its figures go out; now and
then it is evaluated and saved; until the data, the token budget, a cancel or an error ends it."""

from __future__ import annotations

__all__ = ["Training", "Workbench", "as_passing"]

import asyncio
import dataclasses
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from spider_sdk.config.model import OnPolicyOptions
from spider_sdk.errors import (
    Diverged,
    EngineUnavailable,
    FatalJobError,
    LeaseLost,
    PipelineError,
    SpiderError,
)
from spider_worker.pipelines.base import UnitContext
from spider_worker.pipelines.calls import Announcer
from spider_worker.pipelines.onpolicy_train.batch import Batch, BatchMaker
from spider_worker.pipelines.onpolicy_train.checkpoints import Checkpoints, Progress
from spider_worker.pipelines.onpolicy_train.evaluation import Evaluation
from spider_worker.pipelines.onpolicy_train.journal import MetricsJournal
from spider_worker.pipelines.onpolicy_train.parts import RunTracker
from spider_worker.pipelines.onpolicy_train.prompts import Cursor, Prompt, PromptStream
from spider_worker.pipelines.onpolicy_train.record import batch_figures, numbers, require_coverage
from spider_worker.pipelines.onpolicy_train.schedule import LearningRate
from spider_worker.trainers.base import AdamParams, Datum, Loss, Trainer

#: Batches at the start of a run that may be sampled and not scored before it is given up.
_HOPELESS: Final = 4
#: Samples of the last batch that are looked at before a state is saved.
_PROBED: Final = 4
_CURE: Final = "A lower learning_rate, or an advantage_clip, are the usual cures"


@dataclasses.dataclass(frozen=True)
class Workbench:
    """What a run works with. ``steps_total`` None: the data's length is unknown. ``teachers`` maps
    names to weights, ``signals`` to what they are asked for, ``tokenizers`` to tokenizers."""

    trainer: Trainer
    stream: PromptStream
    maker: BatchMaker
    evaluation: Evaluation
    checkpoints: Checkpoints
    journal: MetricsJournal
    tracker: RunTracker | None
    announcer: Announcer
    options: OnPolicyOptions
    learning_rate: LearningRate
    teachers: Mapping[str, float]
    signals: Mapping[str, str]
    tokenizers: Mapping[str, str]
    steps_total: int | None


class Training:
    """One attempt at the run, from ``progress`` on."""

    def __init__(self, ctx: UnitContext, bench: Workbench, progress: Progress) -> None:
        self._ctx = ctx
        self._bench = bench
        self._progress = progress
        self._options = bench.options
        self._ahead: asyncio.Task[list[Prompt]] | None = None
        self._unsaved = False
        self._saving = 0.0  # seconds since the last step's record
        self._between = False  # the weights are those of no whole step
        self._learnt: Sequence[Datum] = ()  # of the last batch
        self._sound = progress.step  # the step whose weights are known to give numbers
        # Of rows before this attempt's; it has met the held-out rows again by now.
        stream = bench.stream
        seen = (stream.errors, stream.dropped) if progress.step else (0, 0)
        self._errors_before = progress.row_errors - seen[0]
        self._dropped_before = progress.rows_dropped - seen[1]
        self._unscored = 0  # batches in a row that were sampled for nothing
        self._why_skipped = ""

    async def execute(self) -> Progress:
        """Train to an end; ``Progress.ended`` says to which: ``data``, ``token_budget`` or
        ``cancelled``. The state is saved and the last step has its checkpoint, also where an
        error ends the run. Where that is Diverged, which tells of the weights that there are, it is
        the last state's step that has it.

        Raises what ended it. A teacher or a service that is gone after the first step is no
        reason to give the job up: it raises PipelineError, and another attempt goes on.
        """
        try:
            await self._loop()
        except (LeaseLost, asyncio.CancelledError):
            raise  # nothing may be written any more, or nothing is in a fit state to be
        except SpiderError as error:
            await self._save_in_distress(error)
            if isinstance(error, EngineUnavailable) and self._progress.step:
                raise as_passing(error) from error
            raise
        except Exception as error:
            # The boundary at which a bug, too, leaves what was trained so far behind it.
            await self._save_in_distress(error)
            raise
        finally:
            if self._ahead is not None:
                self._ahead.cancel()
        return self._progress

    async def _loop(self) -> None:
        progress = self._progress
        progress.ended = None  # of an earlier attempt
        self._read_ahead()
        if progress.step == 0:
            await self._first_evaluation()
        elif await self._evaluates(progress.step):
            await self._evaluate_late()  # the attempt before did not come to it
        while (why := self._end()) is None:
            prompts = await self._prompts()
            if not prompts:
                why = "data"
                break
            await self._step(prompts)
        if progress.batches_skipped and not progress.step and why != "cancelled":
            raise FatalJobError(f"no rollout of the data could be scored: {self._why_skipped}")
        if why != "cancelled" and progress.step and self._bench.evaluation.possible:
            await self._evaluate_late()  # what followed the last step was skipped
        progress.ended = why
        await self._save_if_sound(checkpoint=progress.step > 0)

    def _end(self) -> str | None:
        budget = self._options.token_budget
        if self._ctx.cancelled:
            return "cancelled"
        if budget is not None and self._progress.tokens >= budget:
            return "token_budget"
        return None

    def _read_ahead(self) -> None:
        call = self._bench.stream.take(self._options.groups_per_batch, self._progress.cursor)
        self._ahead = asyncio.create_task(call)

    async def _prompts(self) -> list[Prompt]:
        """The next batch; the one after it is read while this one is trained on."""
        assert self._ahead is not None
        return await self._ahead

    async def _first_evaluation(self) -> None:
        """Where the student stands before it has learnt anything."""
        if not self._bench.evaluation.possible:
            return
        began = time.monotonic()
        figures: dict[str, Any] = await self._bench.evaluation.run(
            await self._bench.trainer.sampler()
        )
        figures["seconds/eval"] = time.monotonic() - began
        self._publish(0, figures, " · ".join(["before training", *_evaluated(figures)]))

    async def _evaluate_late(self) -> None:
        """The evaluation of the last step, where its record has none: in a record of its own."""
        if any(name.startswith("eval/") for name in self._bench.journal.last):
            return
        step, began = self._progress.step, time.monotonic()
        figures: dict[str, Any] = {
            **await self._bench.evaluation.run(await self._bench.trainer.sampler()),
            "seconds/eval": time.monotonic() - began,
        }
        sentence = self._sentence(step, {**self._bench.journal.last, **figures})
        self._publish(step, figures, sentence, more="-eval")

    async def _step(self, prompts: Sequence[Prompt]) -> None:
        bench, progress = self._bench, self._progress
        began = time.monotonic()
        step = progress.step + 1
        sampler = await bench.trainer.sampler()
        refreshed = time.monotonic()
        batch = await bench.maker.make(sampler, prompts, step)
        if not batch.data:
            self._skip(batch, prompts)
            return
        self._unscored = 0
        require_coverage(
            batch, self._options.min_coverage, bench.trainer.info.tokenizer, bench.tokenizers
        )
        trained = time.monotonic()
        figures = await self._learn(batch, prompts[-1].after)
        learnt = time.monotonic()
        progress.step = step
        self._unsaved, self._between, self._learnt = True, False, batch.data
        self._go_past(batch, prompts)
        figures = {
            "epoch": prompts[-1].epoch,
            **batch_figures(batch, bench.teachers),
            **figures,
            "tokens_total": progress.tokens,
            "seconds/sample": refreshed - began + batch.seconds_sample,
            "seconds/score": batch.seconds_score,
            "seconds/train": learnt - trained,
        }
        if self._saving:
            # Behind the step before this one: what is saved holds that one's record.
            figures["seconds/save"], self._saving = self._saving, 0.0
        try:
            if self._options.compute_post_kl:
                now = await bench.trainer.forward(batch.data)
                figures["seconds/train"] = time.monotonic() - trained
                if not _finite(batch.data, now):
                    raise Diverged(f"the weights after step {step} give no numbers. {_CURE}")
                self._sound = step
                figures["post_kl"] = _moved(batch.data, now)
            evaluated = time.monotonic()
            if await self._evaluates(step):
                figures |= await bench.evaluation.run(await bench.trainer.sampler())
                figures["seconds/eval"] = time.monotonic() - evaluated
        except Exception:
            # The step was made all the same: a state of it is saved, and its record goes along.
            self._publish(step, figures, self._sentence(step, figures))
            raise
        figures["seconds"] = time.monotonic() - began
        self._publish(step, figures, self._sentence(step, figures))
        await self._save_if_due(step)

    def _go_past(self, batch: Batch, prompts: Sequence[Prompt]) -> None:
        progress, stream = self._progress, self._bench.stream
        progress.cursor = prompts[-1].after
        progress.tokens += batch.tokens
        progress.row_errors = self._errors_before + stream.errors
        progress.rows_dropped = self._dropped_before + stream.dropped
        self._read_ahead()

    def _skip(self, batch: Batch, prompts: Sequence[Prompt]) -> None:
        """Go past a batch that there is nothing to learn from: long prompts may stand together.

        Raises FatalJobError where a run begins with several that were sampled for nothing: that
        costs, and is hardly the data's doing.
        """
        progress = self._progress
        self._why_skipped = self._why_skipped or batch.why_empty()
        self._unscored += bool(batch.rollouts)
        if self._unscored >= _HOPELESS and not progress.step:
            raise FatalJobError(
                f"no rollout of the first {self._unscored} batches could be scored:"
                f" {self._why_skipped}"
            )
        progress.batches_skipped += 1
        first, last = prompts[0].index, prompts[-1].index
        self._bench.announcer.say(
            "warning",
            "batch.skipped",
            f"the batch of rows {first} to {last} is skipped, nothing of it could be scored:"
            f" {batch.why_empty()}",
            {"rows": [prompt.index for prompt in prompts], "skipped": progress.batches_skipped},
        )
        self._go_past(batch, prompts)
        self._report()

    async def _learn(self, batch: Batch, after: Cursor) -> dict[str, float]:
        """The optimiser steps of a batch; ``after`` is the cursor behind it. Raises FatalJobError
        on a loss that is no finite number, before the weights see it, and Diverged where it is the
        weights that make it so."""
        trainer, options = self._bench.trainer, self._options
        loss = Loss(options.loss_fn)
        total, tokens = 0.0, 0
        measured: dict[str, float] = {}
        chunks = _substeps(batch.data, options.num_substeps)
        rates = self._bench.learning_rate.of_batch(
            self._progress.cursor, after, self._progress.tokens, batch.tokens, len(chunks)
        )
        for chunk, rate in zip(chunks, rates, strict=True):
            result = await trainer.forward_backward(chunk, loss)
            if not math.isfinite(result.loss):
                said = f"the loss of step {self._progress.step + 1} is {result.loss}"
                if not _finite(chunk, result.logprobs):
                    raise Diverged(f"{said}, and the weights before it give no numbers. {_CURE}")
                raise FatalJobError(f"{said}; the weights before it are kept. {_CURE}")
            measured = {**result.metrics, **await trainer.optim_step(AdamParams(rate))}
            self._between = True
            total += result.loss
            tokens += sum(int(datum.mask.sum()) for datum in chunk)
        return {
            **measured,
            "loss": total,
            "loss_per_token": total / max(tokens, 1),
            "learning_rate": rates[0],
        }

    async def _evaluates(self, step: int) -> bool:
        if not self._bench.evaluation.possible:
            return False
        every = self._options.eval_every
        if every and step % every == 0:
            return True
        return self._end() is not None or not await self._prompts()

    def _publish(
        self, step: int, figures: Mapping[str, Any], sentence: str, *, more: str = ""
    ) -> None:
        """A record into the journal, an event, a point in the tracker, the job's counters. ``more``
        tells a further record of the step apart."""
        bench = self._bench
        record = bench.journal.add(step, figures, more=more)
        bench.announcer.say("info", "train.step", sentence, record)
        if bench.tracker is not None:
            bench.tracker.log(step, numbers(record), late=bool(more))
        self._report()

    def _report(self) -> None:
        bench, progress = self._bench, self._progress
        counters: dict[str, float] = {
            "steps_done": progress.step,
            "sampled_tokens": progress.tokens,
            "rows_error": progress.row_errors,
            "rows_dropped": progress.rows_dropped,
        }
        if progress.batches_skipped:
            counters["batches_skipped"] = progress.batches_skipped
        if bench.steps_total is not None:
            counters["steps_total"] = bench.steps_total
        self._ctx.progress(counters)

    def _sentence(self, step: int, figures: Mapping[str, Any]) -> str:
        total = self._bench.steps_total
        parts = [
            f"step {step}" if total is None else f"step {step}/{total}",
            f"kl {figures.get('kl', math.nan):.4f}",
            f"loss {figures['loss_per_token']:.4f} a token",
        ]
        return " · ".join([*parts, *_evaluated(figures)])

    async def _save_if_due(self, step: int) -> None:
        every = self._options.save_every
        checkpoint = bool(every and step % every == 0)
        if checkpoint or self._bench.checkpoints.due():
            await self._save_if_sound(checkpoint=checkpoint)

    async def _save_if_sound(self, *, checkpoint: bool) -> None:
        """Save. Raises Diverged in place of giving up the last good state for weights that are
        worth nothing."""
        if not await self._gives_numbers():
            step = self._progress.step
            raise Diverged(f"the weights after step {step} give no numbers. {_CURE}")
        await self._save(checkpoint=checkpoint)

    async def _gives_numbers(self) -> bool:
        """Whether the weights do, as far as a few samples show; looked at once a step."""
        if self._progress.step != self._sound:
            probed = self._learnt[:_PROBED]
            if not _finite(probed, await self._bench.trainer.forward(probed)):
                return False
            self._sound = self._progress.step
        return True

    async def _known_to_be_ruined(self) -> bool:
        """Where an error has come first: a trainer that cannot be asked is trusted."""
        try:
            return not await self._gives_numbers()
        except PipelineError:
            return False

    async def _save(self, *, checkpoint: bool) -> None:
        began = time.monotonic()
        await asyncio.to_thread(self._bench.journal.sync)
        await self._bench.checkpoints.save(self._progress, checkpoint=checkpoint)
        self._unsaved = False
        self._saving += time.monotonic() - began

    async def _save_in_distress(self, why: BaseException) -> None:
        """Keep what the last whole step left, where an error ends the attempt. What then keeps it
        from being saved must not hide that error: it becomes a note on it."""
        try:
            if isinstance(why, Diverged):
                why.add_note(await self._keep_last_state())
            elif self._between:
                # No state: whoever went on from it would take a part of the step twice.
                step, whole = self._progress.step, self._progress.saved
                await self._bench.checkpoints.save_adapter(self._progress)
                if step and step not in whole:
                    said = f"the checkpoint of step {step} has a part of step {step + 1} in it"
                    why.add_note(said)
            elif not self._unsaved:
                await self._bench.checkpoints.save_adapter(self._progress)
            elif await self._known_to_be_ruined():
                why.add_note(await self._keep_last_state())
            else:
                await self._save(checkpoint=True)
        except Exception as error:  # noqa: BLE001 - whatever it is, it came second
            why.add_note(f"and the last step could not be saved: {error}")

    async def _keep_last_state(self) -> str:
        """Give the step of the last state its checkpoint, in place of weights that are worth
        nothing; says what was done."""
        progress = await self._bench.checkpoints.reload()
        if not (progress.step and self._learnt):
            return "no step before it was saved"
        if not _finite(self._learnt, await self._bench.trainer.forward(self._learnt)):
            return f"the state of step {progress.step} is no better: begin with a checkpoint"
        await self._bench.checkpoints.save_adapter(progress)
        return f"step {progress.step} is the last that was saved, and is kept"


def as_passing(error: EngineUnavailable) -> PipelineError:
    """The same, with its notes, as what another attempt may get over."""
    found = PipelineError(error.message)
    for note in getattr(error, "__notes__", ()):
        found.add_note(note)
    return found


def _substeps(data: Sequence[Datum], count: int) -> list[Sequence[Datum]]:
    """``count`` parts of about equal size, in order, none empty."""
    edges = [len(data) * number // count for number in range(count + 1)]
    return [data[low:high] for low, high in itertools.pairwise(edges) if high > low]


def _finite(data: Sequence[Datum], logprobs: Sequence[Any]) -> bool:
    """Whether the log-probabilities of what is trained are numbers."""
    return all(
        np.isfinite(found[datum.mask]).all() for datum, found in zip(data, logprobs, strict=True)
    )


def _moved(data: Sequence[Datum], now: Sequence[Any]) -> float:
    """KL(old‖new) in nats a token, from the tokens that the old policy sampled."""
    moves = [
        (datum.logprobs - logprobs)[datum.mask] for datum, logprobs in zip(data, now, strict=True)
    ]
    return float(np.concatenate(moves).mean())


def _evaluated(figures: Mapping[str, Any]) -> list[str]:
    """Of an evaluation, what a sentence says; nothing where there was none."""
    labels = {"eval/kl": "held-out kl {:.4f}", "eval/score": "score {:.3f}"}
    return [label.format(figures[name]) for name, label in labels.items() if name in figures]
