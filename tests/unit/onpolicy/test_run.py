"""A training run on tiny models, with the real trainer and teachers: what it leaves, and that an
interrupted one ends where an unbroken one does."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from spider_sdk.config import parse_job
from spider_sdk.config.model import JobConfig
from spider_sdk.errors import (
    AuthError,
    Diverged,
    EngineUnavailable,
    FatalJobError,
    JobCancelled,
    PipelineError,
)
from spider_worker.pipelines.local import LocalContext, LocalStore
from spider_worker.pipelines.onpolicy_train import training
from spider_worker.pipelines.onpolicy_train.build import real_parts
from spider_worker.pipelines.onpolicy_train.checkpoints import Checkpoints
from spider_worker.pipelines.onpolicy_train.evaluation import Evaluation
from spider_worker.pipelines.onpolicy_train.supervision import Judgement, Rollout, Supervision
from spider_worker.settings import WorkerSettings
from spider_worker.testing import InMemorySource
from spider_worker.tinker_service.errors import Gone
from spider_worker.trainers.base import AdamParams, ForwardBackward
from tests.support.distil import Models, Run, training_job

SAMPLED = {"signal": "sampled"}
ROW = {"question": "count 1 and 4", "kind": "odd"}
DEMO = Path(__file__).parents[3] / "config" / "demo"


class Broken(BaseException):
    """The process dies: nothing may be caught, and nothing is saved any more."""


Call = Callable[..., Any]


def counted(method: str, behave: Callable[..., Any]) -> Callable[[Any], Any]:
    """A change to ``trainer`` or ``teacher``: a call of ``method`` of what it makes goes to
    ``behave``, with its number (from 1), the real method and what it was given."""

    def change(make: Callable[..., Any]) -> Callable[..., Any]:
        def build(*args: Any) -> Any:
            made = make(*args)
            real, seen = getattr(made, method), 0

            async def call(*given: Any, **named: Any) -> Any:
                nonlocal seen
                seen += 1
                return await behave(seen, real, *given, **named)

            setattr(made, method, call)
            return made

        return build

    return change


def after(calls: int, error: BaseException, method: str) -> Callable[[Any], Any]:
    """``method`` raises ``error`` at its call number ``calls`` + 1, and at every later one."""

    async def behave(number: int, real: Call, *given: Any, **named: Any) -> Any:
        if number > calls:
            raise error
        return await real(*given, **named)

    return counted(method, behave)


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if not name.startswith("seconds")}
        for record in records
    ]


def teacher(models: Models, **more: Any) -> dict[str, Any]:
    return {"teacher": {"name": str(models.teacher), **more}}


def test_what_a_run_leaves(tmp_path: Path, models: Models) -> None:
    run = Run(tmp_path, models, options={"eval_every": 2, "save_every": 2, "compute_post_kl": True})
    result = run.go().result
    records = run.metrics()
    assert [record["step"] for record in records] == list(range(7))
    assert [step for step, record in enumerate(records) if "eval/kl" in record] == [0, 2, 4, 6]
    for record in records[1:]:
        assert math.isfinite(record["loss"])
        assert record["post_kl"] == pytest.approx(record["post_kl"])
        assert record["samples"] == 8
        assert record["tokens"] <= 48
        assert 0 < record["coverage"] <= 1
        # Of the tokens that were not compared it is said why.
        dropped = sum(value for name, value in record.items() if name.startswith("dropped/"))
        assert dropped == pytest.approx(record["tokens"] * (1 - record["coverage"]))
        assert record["longest_span"] >= 1
        assert {"kl", "entropy", "length_mean", "truncated", "advantage_mean"} <= record.keys()
        assert {"seconds/sample", "seconds/score", "seconds/train"} <= record.keys()
        assert record["grad_norm"] > 0
    # Told by the next step's: what is saved holds the record of its own.
    assert {3, 5} <= {record["step"] for record in records if "seconds/save" in record}
    steps = run.events("train.step")
    assert without_times(list(map(dict, steps))) == without_times(records)
    saved = sorted(path.parent.name for path in run.artifact("checkpoints").glob("*/*.json"))
    assert saved == ["step-000002", "step-000004", "step-000006"]
    assert run.artifact("curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads(run.artifact("summary.json").read_bytes())
    assert (summary["steps"], summary["ended"]) == (6, "data")
    assert summary["checkpoints"] == [2, 4, 6]
    assert summary["final"]["step"] == 6
    assert "6 steps" in result.message
    last = run.artifact("checkpoints/step-000006/adapter_model.safetensors").read_bytes()
    assert run.artifact("adapter/adapter_model.safetensors").read_bytes() == last


def test_an_interrupted_run_ends_as_an_unbroken_one(tmp_path: Path, models: Models) -> None:
    # The learning rate, too, has to go on from where it was.
    options = {"num_substeps": 2, "save_every": 2, "epochs": 2, "lr_schedule": "linear"}
    options |= teacher(models, **SAMPLED)
    whole = Run(tmp_path / "whole", models, options=options)
    whole.go()
    broken = Run(tmp_path / "broken", models, options=options)
    # Dies in the middle of the step after a checkpoint and one more: that step is done again.
    broken._changes["trainer"] = after(7, Broken(), "optim_step")
    with pytest.raises(Broken):
        broken.go()
    broken._changes.clear()
    result = broken.go()
    assert broken.events("train.resumed") == [{"step": 2}]
    assert without_times(broken.metrics()) == without_times(whole.metrics())
    mine, theirs = (
        load_file(run.artifact("adapter/adapter_model.safetensors")) for run in (broken, whole)
    )
    assert mine.keys() == theirs.keys()
    for name, values in theirs.items():
        assert (mine[name] == values).all(), name
    assert result.records()[-1]["step"] == 12


def rates(run: Run) -> list[float]:
    """What the optimiser steps of a run are taken with."""
    taken: list[float] = []

    async def note(_: int, real: Call, adam: AdamParams) -> Any:
        taken.append(adam.learning_rate)
        return await real(adam)

    run._changes["trainer"] = counted("optim_step", note)
    run.go()
    return taken


def test_the_learning_rate_falls_to_nothing_by_the_end_of_the_data(
    tmp_path: Path, models: Models
) -> None:
    options = {"lr_schedule": "linear", "num_substeps": 2, **teacher(models, **SAMPLED)}
    run = Run(tmp_path, models, options=options)
    taken = rates(run)
    # Of 26 rows those with the indices 6 and 19 are held out.
    read = [0, 4, 9, 13, 17, 22, 26]
    halves = [part for a, b in itertools.pairwise(read) for part in (a, (a + b) / 2)]
    assert taken == pytest.approx([1e-2 * (1 - rows / 26) for rows in halves])
    told = [record["learning_rate"] for record in run.metrics()[1:]]
    assert told == taken[::2]


def test_or_by_the_end_of_the_token_budget(tmp_path: Path, models: Models) -> None:
    budget = {"token_budget": 100, "num_substeps": 2}
    options = {"lr_schedule": "linear", **budget, **teacher(models, **SAMPLED)}
    run = Run(tmp_path, models, options=options)
    run._changes["source"] = lambda make: lambda ctx, seed: InMemorySource([ROW] * 26, stream=True)
    taken = rates(run)
    sampled = [0, *(min(100, record["tokens_total"]) for record in run.metrics()[1:])]
    halves = [part for a, b in itertools.pairwise(sampled) for part in (a, (a + b) / 2)]
    assert taken == pytest.approx([1e-2 * (1 - tokens / 100) for tokens in halves])
    assert sampled[-1] == 100


def test_a_schedule_towards_an_end_that_nobody_knows_is_refused(
    tmp_path: Path, models: Models
) -> None:
    run = Run(tmp_path, models, options={"lr_schedule": "linear"})
    run._changes["source"] = lambda make: lambda ctx, seed: InMemorySource([ROW], stream=True)
    run._changes["trainer"] = lambda make: pytest.fail  # nothing was loaded for it
    with pytest.raises(FatalJobError, match=r"lr_schedule: linear has to know .* token_budget"):
        run.go()


@pytest.mark.parametrize("signal", ["full", "topk", "sampled"])
def test_the_student_comes_nearer_to_its_teacher(tmp_path: Path, signal: str) -> None:
    # The demo's models: a student that mostly cannot add, a teacher with other tokens that can.
    models = Models(DEMO, DEMO / "student", DEMO / "teacher")
    lines = (DEMO / "sums.jsonl").read_bytes().splitlines()[:256]
    options = {
        "learning_rate": 3e-3, "groups_per_batch": 16, "group_size": 4, "max_tokens": 8,
        "lora_rank": 16, "baseline": "position", "eval_examples": 32, "min_coverage": 0.9,
        **teacher(models, signal=signal),
    }  # fmt: skip
    run = Run(tmp_path, models, rows=[json.loads(line) for line in lines], options=options)
    run.go()
    records = run.metrics()
    assert records[-1]["coverage"] > 0.95
    assert records[-1]["eval/kl"] < 0.5 * records[0]["eval/kl"]


def test_a_record_tells_of_the_stop_tokens_and_the_longest_span(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, judged = Supervision.judge, []

    async def remember(self: Supervision, rollout: Rollout) -> Judgement:
        found = await judge(self, rollout)
        judged.append((rollout, found))
        return found

    monkeypatch.setattr(Supervision, "judge", remember)
    models = Models(DEMO, DEMO / "student", DEMO / "teacher")
    lines = (DEMO / "sums.jsonl").read_bytes().splitlines()[:6]
    options = {"max_tokens": 8, **teacher(models, **SAMPLED)}
    run = Run(tmp_path, models, rows=[json.loads(line) for line in lines], options=options)
    run.go()
    _, record = run.metrics()
    batch = judged[2:10]  # between the evaluations of the 2 rows that are held out
    # With one teacher, no discount and no clip, an advantage is the KL of its token.
    stops = [
        -found.advantages[-1] for rollout, found in batch if rollout.sample.stop_reason == "stop"
    ]
    assert len(stops) > 4
    assert record["stop_kl"] == pytest.approx(float(np.mean(stops)), rel=1e-4)
    spans = [verdict.longest_span for _, found in batch for verdict in found.verdicts]
    assert record["longest_span"] == max(spans) > 1


def test_a_teacher_that_is_the_student_teaches_nothing(tmp_path: Path, models: Models) -> None:
    # I6: A is 0 everywhere, so the weights stay where they are.
    # (Adam makes whole steps of what rounding leaves, so the rate must be next to nothing.)
    options = {"teacher": {"name": str(models.student), **SAMPLED}, "learning_rate": 1e-12}
    run = Run(tmp_path, models, options=options)
    run.go()
    for record in run.metrics()[1:]:
        assert record["kl"] == pytest.approx(0, abs=1e-5)
        assert record["loss"] == pytest.approx(0, abs=1e-4)
        assert record["coverage"] == 1


def test_a_token_budget_ends_the_run_with_a_checkpoint(tmp_path: Path, models: Models) -> None:
    run = Run(tmp_path, models, options={"token_budget": 90, "eval_every": 0})
    run.go()
    summary = json.loads(run.artifact("summary.json").read_bytes())
    assert summary["ended"] == "token_budget"
    assert summary["checkpoints"] == [summary["steps"]]
    assert summary["sampled_tokens"] >= 90
    assert "eval/kl" in run.metrics()[-1]


def cancel_in_step(run: Run, step: int) -> Callable[[Any], Any]:
    async def behave(number: int, real: Call, adam: AdamParams) -> Any:
        if number == step:
            run.ctx.cancel()
        return await real(adam)

    return counted("optim_step", behave)


def test_a_cancel_lets_the_step_end_and_a_retry_goes_on(tmp_path: Path, models: Models) -> None:
    run = Run(tmp_path, models)
    run._changes["trainer"] = cancel_in_step(run, 3)
    with pytest.raises(JobCancelled):
        run.go()
    assert [record["step"] for record in run.metrics()] == [0, 1, 2, 3]
    assert run.artifact("checkpoints/step-000003/adapter_config.json").is_file()
    run._changes.clear()
    run.go(retry=True)
    assert [record["step"] for record in run.metrics()] == list(range(7))
    assert run.events("train.resumed") == [{"step": 3}]


def poisoned(step: int) -> Callable[[Any], Any]:
    """The loss of that step is no number."""

    async def behave(number: int, real: Call, *given: Any) -> ForwardBackward:
        found: ForwardBackward = await real(*given)
        return ForwardBackward(math.nan, found.logprobs) if number == step else found

    return counted("forward_backward", behave)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_step(
    tmp_path: Path, models: Models
) -> None:
    run = Run(tmp_path, models, changes={"trainer": poisoned(3)})
    with pytest.raises(FatalJobError, match="the loss of step 3 is nan"):
        run.go()
    assert run.artifact("checkpoints/step-000002/adapter_model.safetensors").is_file()
    # What led up to it is what one wants to see then.
    assert [record["step"] for record in run.metrics()] == [0, 1, 2]
    assert run.artifact("curves.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "state.json").read_bytes())
    assert document["state"]["progress"]["step"] == 2


def ruined(step: int) -> Callable[[Any], Any]:
    """That step of the optimiser leaves weights with which nothing can be computed."""

    async def behave(number: int, real: Call, adam: AdamParams) -> Any:
        return await real(AdamParams(1e30) if number == step else adam)

    return counted("optim_step", behave)


@pytest.mark.parametrize("post_kl", [False, True])
def test_weights_that_training_has_ruined_are_not_kept(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch, post_kl: bool
) -> None:
    due = iter((False, True))
    monkeypatch.setattr(Checkpoints, "due", lambda _: next(due, False))
    options = {"eval_every": 0, "compute_post_kl": post_kl}
    run = Run(tmp_path, models, options=options, changes={"trainer": ruined(3)})
    with pytest.raises(Diverged) as caught:
        run.go()
    assert caught.value.message.endswith("; step 2 is the last that was saved, and is kept")
    kept = run.artifact("checkpoints")
    assert [path.name for path in kept.iterdir()] == ["step-000002"]
    weights = load_file(kept / "step-000002" / "adapter_model.safetensors")
    assert max(abs(values).max() for values in weights.values()) < 10
    document = json.loads((tmp_path / "state.json").read_bytes())
    assert document["state"]["progress"]["step"] == 2
    run._changes.clear()
    run.go(retry=True)
    assert run.events("train.resumed") == [{"step": 2}]
    assert run.metrics()[-1]["step"] == 6


@pytest.mark.parametrize("looks", [True, False])
def test_a_state_is_not_replaced_by_ruined_weights(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch, looks: bool
) -> None:
    """Where a look at a few samples does not show it, it is said that the state is no better."""
    monkeypatch.setattr(Checkpoints, "due", lambda _: True)
    if not looks:
        monkeypatch.setattr(training, "_PROBED", 0)
    options = {"eval_every": 0, "save_every": 2}
    run = Run(tmp_path, models, options=options, changes={"trainer": ruined(3)})
    said = "step 2 is the last that was saved" if looks else "the state of step 3 is no better"
    with pytest.raises(Diverged, match=said):
        run.go()
    assert [path.name for path in run.artifact("checkpoints").iterdir()] == ["step-000002"]
    document = json.loads((tmp_path / "state.json").read_bytes())
    assert document["state"]["progress"]["step"] == (2 if looks else 3)


def test_a_last_step_that_ruins_the_weights_is_no_result(tmp_path: Path, models: Models) -> None:
    options = {"eval_every": 0, "save_every": 2}
    run = Run(tmp_path, models, rows=18, options=options, changes={"trainer": ruined(4)})
    with pytest.raises(Diverged, match="step 2 is the last that was saved"):
        run.go()
    assert [path.name for path in run.artifact("checkpoints").iterdir()] == ["step-000002"]


def test_a_checkpoint_that_could_not_be_kept_is_not_named(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError("no space left on device")
    keep = LocalContext.keep

    def refuse(self: Any, files: Any, *rest: Any, **more: Any) -> Any:
        if any(name.startswith("checkpoints/step-000002") for name in files):
            raise full
        return keep(self, files, *rest, **more)

    monkeypatch.setattr(LocalContext, "keep", refuse)
    run = Run(tmp_path, models, options={"save_every": 2})
    with pytest.raises(OSError, match="no space left"):
        run.go()
    monkeypatch.undo()
    run.go()
    saved = json.loads((tmp_path / "state.json").read_bytes())["state"]["progress"]["saved"]
    kept = sorted(path.name for path in run.artifact("checkpoints").iterdir())
    assert [f"step-{step:06d}" for step in saved] == kept


def test_ruined_weights_are_not_saved_behind_another_error(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever meets them first may have another word for them."""
    due, calls, real = iter((False, True)), itertools.count(1), Evaluation.run
    monkeypatch.setattr(Checkpoints, "due", lambda _: next(due, False))

    async def fail(self: Evaluation, sampler: Any) -> Any:
        if next(calls) == 2:
            raise PipelineError("nothing came back")
        return await real(self, sampler)

    monkeypatch.setattr(Evaluation, "run", fail)
    run = Run(tmp_path, models, options={"eval_every": 3}, changes={"trainer": ruined(3)})
    with pytest.raises(PipelineError, match=r"nothing came back\n.*step 2 is the last that was"):
        run.go()
    document = json.loads((tmp_path / "state.json").read_bytes())
    assert document["state"]["progress"]["step"] == 2


@pytest.mark.parametrize("paced", [False, True])
def test_a_key_that_is_refused_in_the_middle_costs_no_step(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch, paced: bool
) -> None:
    """The last step has its checkpoint, also where its state was saved already."""
    monkeypatch.setattr(Checkpoints, "due", lambda _: paced)
    refused = AuthError("the teacher refuses the key")
    run = Run(tmp_path, models, changes={"teacher": after(40, refused, "compute_distributions")})
    with pytest.raises(AuthError):
        run.go()
    step = run.metrics()[-1]["step"]
    assert step > 0
    assert run.artifact(f"checkpoints/step-{step:06d}/adapter_model.safetensors").is_file()


def test_an_attempt_that_does_not_come_to_train_leaves_the_adapter_of_its_state(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "due", lambda _: True)
    run = Run(tmp_path, models, changes={"trainer": after(3, Broken(), "optim_step")})
    with pytest.raises(Broken):
        run.go()
    assert not run.artifact("checkpoints").exists()
    gone = EngineUnavailable("the teacher's server is gone")
    gone.add_note("and the light is off")
    run._changes = {"teacher": after(0, gone, "start")}
    with pytest.raises(PipelineError, match="is gone") as raised:
        run.go()
    assert raised.value.__notes__ == ["and the light is off"]
    assert run.artifact("checkpoints/step-000003/adapter_model.safetensors").is_file()


def test_a_teacher_whose_scores_are_off_is_found_before_the_first_step(
    tmp_path: Path, models: Models
) -> None:
    """By the self-test, whose own tests are beside it."""

    async def shifted(_: int, real: Call, *given: Any, **named: Any) -> Any:
        found = await real(*given, **named)
        return dataclasses.replace(found, logprobs=np.roll(found.logprobs, 1))

    run = Run(tmp_path, models, changes={"teacher": counted("compute_logprobs", shifted)})
    with pytest.raises(FatalJobError, match=r"self-test|its tokens|scores"):
        run.go()
    assert not run.events("train.step")


def test_a_step_whose_figures_fail_is_a_whole_one(tmp_path: Path, models: Models) -> None:
    gone = EngineUnavailable("the service is gone")
    run = Run(tmp_path, models, options={"compute_post_kl": True})
    run._changes["trainer"] = after(2, gone, "forward")
    with pytest.raises(PipelineError, match="is gone"):
        run.go()
    assert [record["step"] for record in run.metrics()] == [0, 1, 2, 3]
    run._changes.clear()
    run.go()
    assert run.events("train.resumed") == [{"step": 3}]


def test_a_teacher_that_is_lost_in_the_middle_fails_the_attempt_not_the_job(
    tmp_path: Path, models: Models
) -> None:
    gone = EngineUnavailable("the teacher's server is gone")
    run = Run(tmp_path, models, changes={"teacher": after(40, gone, "compute_distributions")})
    with pytest.raises(PipelineError, match="is gone"):
        run.go()
    step = json.loads((tmp_path / "state.json").read_bytes())["state"]["progress"]["step"]
    assert step > 0
    run._changes.clear()
    run.go()
    assert run.events("train.resumed") == [{"step": step}]
    first = Run(tmp_path / "first", models, changes={"teacher": after(0, gone, "start")})
    with pytest.raises(EngineUnavailable):
        first.go()


def test_a_session_that_is_lost_fails_the_attempt_and_the_next_goes_on(
    tmp_path: Path, models: Models
) -> None:
    gone = Gone("the model is not loaded", status=404, detail="not loaded")
    run = Run(tmp_path, models, changes={"trainer": after(2, gone, "forward_backward")})
    # The server is started again, and takes its time: neither is the job's end.
    for change in (dict(run._changes), {"trainer": after(0, gone, "start")}):
        run._changes = change
        with pytest.raises(PipelineError) as caught:
            run.go()
        assert not isinstance(caught.value, FatalJobError)
    run._changes.clear()
    run.go()
    assert run.events("train.resumed") == [{"step": 2}]


def test_a_step_that_was_cut_short_leaves_its_adapter_and_no_state(
    tmp_path: Path, models: Models
) -> None:
    options = {"num_substeps": 2, **teacher(models, **SAMPLED)}
    whole = Run(tmp_path / "whole", models, options=options)
    whole.go()
    # The second part of step 3: the first has moved the weights already.
    gone = EngineUnavailable("the service is gone")
    broken = Run(tmp_path / "broken", models, options=options)
    broken._changes["trainer"] = after(5, gone, "forward_backward")
    with pytest.raises(PipelineError, match="is gone") as caught:
        broken.go()
    assert caught.value.__notes__ == ["the checkpoint of step 2 has a part of step 3 in it"]
    assert broken.artifact("checkpoints/step-000002/adapter_model.safetensors").is_file()
    broken._changes.clear()
    broken.go()
    assert without_times(broken.metrics()) == without_times(whole.metrics())


def test_a_step_whose_evaluation_fails_is_on_record(tmp_path: Path, models: Models) -> None:
    failing = {
        "name": "score",
        "source": "calls = 0\n"
        "def score(row):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return 1 if calls <= 4 else 1 / 0\n",
    }
    options = {"eval_every": 2}
    run = Run(tmp_path, models, evaluator=failing, options=options)
    with pytest.raises(FatalJobError, match="division by zero"):
        run.go()
    document = json.loads((tmp_path / "state.json").read_bytes())
    step = document["state"]["progress"]["step"]
    assert step > 0
    journal = tmp_path / "units" / document["units"]["train"]["journal"]
    told = [json.loads(line)["step"] for line in journal.read_bytes().splitlines()]
    assert told == list(range(step + 1))


def test_held_out_rows_that_cannot_be_asked_do_not_end_the_run(
    tmp_path: Path, models: Models
) -> None:
    # Of 8 rows in all, those that are held out are longer than the student's context.
    rows = [{"question": "count " * (200 if n in (2, 6) else 1), "kind": "odd"} for n in range(8)]
    run = Run(tmp_path, models, rows=rows)
    run.go()
    assert [record["step"] for record in run.metrics()] == [0, 1, 2]
    assert run.metrics()[0]["eval/prompts_refused"] == 2
    assert "eval/kl" not in run.metrics()[0]


LONG = "count " * 200  # than the student's context


@pytest.mark.parametrize(
    ("long", "steps", "evaluated"),
    [
        ((4, 6, 7, 8), [0, 1, 2], [0, 2]),
        # The last batch: what would have been evaluated after it is, before it.
        ((9,), [0, 1, 2, 2], [0, 2]),
    ],
)
def test_a_batch_that_cannot_be_sampled_is_skipped_and_counted(
    tmp_path: Path, models: Models, long: tuple[int, ...], steps: list[int], evaluated: list[int]
) -> None:
    rows = [{"question": LONG if n in long else "count", "kind": "odd"} for n in range(10)]
    run = Run(tmp_path, models, rows=rows, options={"eval_examples": 1})  # row 5 is held out
    result = run.go().result
    records = run.metrics()
    assert [record["step"] for record in records] == steps
    assert len({record["id"] for record in records}) == len(records)
    assert [record["step"] for record in records if "eval/kl" in record] == evaluated
    assert run.events("batch.skipped") == [{"rows": list(long), "skipped": 1}]
    summary = json.loads(run.artifact("summary.json").read_bytes())
    assert summary["batches_skipped"] == 1
    assert {"kl", "eval/kl"} <= summary["final"].keys()
    assert "held-out kl" in result.message


def test_data_that_cannot_be_sampled_at_all_ends_the_run(tmp_path: Path, models: Models) -> None:
    rows = [{"question": LONG, "kind": "odd"}] * 14
    with pytest.raises(FatalJobError, match=r"no rollout of the data could be scored: row 0: "):
        Run(tmp_path, models, rows=rows).go()


def test_a_teacher_that_scores_nothing_ends_the_run_soon(tmp_path: Path, models: Models) -> None:
    options = teacher(models, when={"kind": "neither"})
    run = Run(tmp_path, models, options=options)
    with pytest.raises(FatalJobError, match=r"first 4 batches .* no teacher for this row"):
        run.go()


def test_a_rule_on_a_column_that_there_is_not_is_refused(tmp_path: Path, models: Models) -> None:
    rule = {"name": str(models.teacher), "when": {"knid": "odd"}}
    run = Run(tmp_path, models, options={"teacher": [{"name": str(models.teacher)}, rule]})
    with pytest.raises(FatalJobError, match=r"teacher\[1\]\.when 'knid' is no column .* kind"):
        run.go()


def test_rows_that_make_no_prompt_are_counted_once_over_all_attempts(
    tmp_path: Path, models: Models
) -> None:
    # Row 2 is held out, and 3 and 8 are read ahead of where the run breaks off, or after it.
    rows = [
        {"kind": "odd"} if n in (2, 3, 8, 13, 19, 20) else {"question": "count", "kind": "odd"}
        for n in range(24)
    ]
    options = {"save_every": 1, "eval_examples": 5}
    whole = Run(tmp_path / "whole", models, rows=rows, options=options)
    whole.go()
    broken = Run(tmp_path / "broken", models, rows=rows, options=options)
    broken._changes["trainer"] = after(2, Broken(), "optim_step")
    with pytest.raises(Broken):
        broken.go()
    broken._changes.clear()
    broken.go()
    assert broken.events("train.resumed") == [{"step": 2}]
    counted = [
        json.loads(run.artifact("summary.json").read_bytes())["rows_error"]
        for run in (whole, broken)
    ]
    assert counted == [6, 6]


def test_an_evaluation_that_failed_is_made_when_the_run_goes_on(
    tmp_path: Path, models: Models
) -> None:
    broken = {
        "name": "score",
        "source": "calls = 0\n"
        "def score(row):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return 1 if calls <= 2 else 1 / 0\n",
    }
    for every, step in ((2, 2), (0, 6)):  # that of a step, and the last one
        folder, options = tmp_path / str(every), {"eval_every": every}
        run = Run(folder, models, evaluator=broken, options=options)
        with pytest.raises(FatalJobError, match="division by zero"):
            run.go()
        again = Run(folder, models, evaluator=EVALUATOR, options=options)
        again.go()
        assert again.events("train.resumed") == [{"step": step}]
        scored = [record["step"] for record in again.metrics() if "eval/score" in record]
        assert scored == ([0, 2, 4, 6] if every else [0, 6])
        assert json.loads(again.artifact("summary.json").read_bytes())["final"]["kl"] > 0


def test_a_seed_that_the_run_drew_is_told(tmp_path: Path, models: Models) -> None:
    run = Run(tmp_path, models, rows=6, options={"seed": None})
    seeds = []

    def change(make: Callable[..., Any]) -> Callable[..., Any]:
        def build(ctx: Any, seed: int) -> Any:
            seeds.append(seed)
            return make(ctx, seed)

        return build

    run._changes["source"] = change
    run.go()
    (told,) = run.events("train.seed")
    assert set(seeds) == {told["seed"]}
    assert json.loads(run.artifact("summary.json").read_bytes())["seed"] == told["seed"]
    assert f"| Seed | {told['seed']} |" in run.artifact("adapter/README.md").read_text("utf-8")


def test_the_runs_seed_shuffles_the_data(tmp_path: Path, models: Models) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": str(n)}) + "\n" for n in range(20)))
    document = training_job(models, source={"dataset": str(path), "shuffle": True})
    job = parse_job(document)
    assert isinstance(job, JobConfig)
    parts = real_parts(WorkerSettings(data_roots=str(tmp_path), state=tmp_path / "state"))
    ctx = LocalContext(LocalStore(tmp_path / "store"), job)

    def order(seed: int) -> list[str]:
        source = parts.source(ctx, seed)
        try:
            return [row["question"] for batch in source.batches(0, None) for _, row in batch]
        finally:
            source.close()

    first, again, other = (order(seed) for seed in (7, 7, 8))
    assert first == again
    assert sorted(first) == sorted(other)
    assert first != other


def test_options_that_find_little_to_do_are_warned_of(tmp_path: Path, models: Models) -> None:
    for signal, asked, told in (
        ("full", {"loss_fn": "ppo", "kl_discount_factor": 0.5}, True),
        ("full", {"advantage_clip": 1.0, "baseline": "position"}, True),
        ("sampled", {"loss_fn": "ppo"}, False),
        ("full", {"loss_fn": "importance_sampling"}, False),
    ):
        options = {**teacher(models, signal=signal), **asked}
        folder = tmp_path / "-".join([signal, *map(str, asked.values())])
        run = Run(folder, models, rows=6, options=options)
        run.go()
        assert run.events("train.idle_options") == ([asked] if told else [])
    card = run.artifact("adapter/README.md").read_text("utf-8")
    assert "signal full" in card


def test_too_little_in_common_names_both_tokenizers(tmp_path: Path, models: Models) -> None:
    run = Run(tmp_path, models, options={"min_coverage": 1.0})
    with pytest.raises(FatalJobError, match="min_coverage") as caught:
        run.go()
    assert str(models.student) in caught.value.message
    assert str(models.teacher) in caught.value.message


def test_rows_go_to_the_teachers_that_they_are_for(tmp_path: Path, models: Models) -> None:
    teachers = [
        {"name": str(models.teacher), "when": {"kind": ["odd"]}, "weight": 3},
        {"name": str(models.student), "when": {"kind": "even"}},
    ]
    run = Run(tmp_path, models, options={"teacher": teachers, "learning_rate": 1e-12})
    run.go()
    for record in run.metrics()[1:]:
        assert record[f"kl/{models.teacher}"] > 0.1
        assert record[f"kl/{models.student}"] == pytest.approx(0, abs=1e-5)
        mean = (3 * record[f"kl/{models.teacher}"] + record[f"kl/{models.student}"]) / 4
        assert record["kl"] == pytest.approx(mean)
        assert record["samples_unscored"] == 0


EVALUATOR = {
    "name": "score",
    "source": "def score(row, bonus):\n"
    "    assert row['question'].startswith('count') and isinstance(row['completion'], str)\n"
    "    return {'score': bonus, 'long': len(row['completion']) > 3}\n",
    "kwargs": {"bonus": 0.25},
}


def test_the_evaluator_scores_held_out_rows(tmp_path: Path, models: Models) -> None:
    run = Run(tmp_path, models, evaluator=EVALUATOR, options={"eval_every": 3})
    run.go()
    scored = [record["step"] for record in run.metrics() if "eval/score" in record]
    assert scored == [0, 3, 6]
    assert run.metrics()[3]["eval/score"] == 0.25
    assert 0 <= run.metrics()[3]["eval/long"] <= 1


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def score(row): return 'good'", "'good' as score"),
        ("def score(row): return 1 / 0", "division by zero"),
    ],
)
def test_an_evaluator_that_is_wrong_ends_the_job_before_it_costs_anything(
    tmp_path: Path, models: Models, source: str, said: str
) -> None:
    run = Run(tmp_path, models, evaluator={"name": "score", "source": source})
    with pytest.raises(FatalJobError, match=said):
        run.go()
    assert run.events("train.step") == []


def test_biased_sampling_is_warned_of(tmp_path: Path, models: Models) -> None:
    plain: Mapping[str, Any] = {"temperature": 1.0, "top_p": 1}
    run = Run(tmp_path / "plain", models, rows=6, generation=sampling(models, plain))
    run.go()
    assert run.events("train.biased_sampling") == []
    for biased in ({"temperature": 0.7, "top_k": 40}, {"top_p": 0.9}):
        folder = tmp_path / "-".join(biased)
        run = Run(folder, models, rows=6, generation=sampling(models, biased))
        run.go()
        assert run.events("train.biased_sampling") == [biased]
        codes = [code for _, code, _, _ in run.ctx.events]
        assert codes.index("train.biased_sampling") < codes.index("train.step")


def sampling(models: Models, parameters: Mapping[str, Any]) -> dict[str, Any]:
    options = {
        "teacher": str(models.teacher), "groups_per_batch": 4, "max_tokens": 4,
        "lora_rank": 4, "min_coverage": 0,
    }  # fmt: skip
    return {"on_policy": True, "on_policy_options": options, "parameters": dict(parameters)}


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"min_p": 0.1}, "min_p"),
        ({"max_tokens": 9}, "max_tokens"),
        ({"temperature": "hot"}, "temperature: expected a number"),
        ({"temperature": -1}, "temperature: expected"),
        ({"top_p": -1}, "top_p: expected"),
        ({"top_p": 1.7}, "top_p: expected"),
        ({"top_k": 0.5}, "top_k: expected"),
        ({"stop_token_ids": 5}, "stop_token_ids: expected a list"),
        ({"seed": "one"}, "seed: expected"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs: expected a mapping"),
    ],
)
def test_a_sampling_parameter_that_training_has_not_is_refused(
    tmp_path: Path, models: Models, parameters: dict[str, Any], said: str
) -> None:
    run = Run(tmp_path, models, generation=sampling(models, parameters))
    with pytest.raises(FatalJobError, match=said):
        run.go()


def test_training_starts_from_a_checkpoint_of_the_same_student_alone(
    tmp_path: Path, models: Models
) -> None:
    first = Run(models.root / "first", models, rows=10)
    first.go()
    adapter = first.artifact("adapter")
    again = Run(
        tmp_path / "again", models, rows=10, options={"student_checkpoint_path": str(adapter)}
    )
    again.go()
    assert again.metrics()[0]["eval/kl"] == pytest.approx(first.metrics()[-1]["eval/kl"], rel=1e-3)
    for options, said in (
        ({"student_checkpoint_path": str(adapter), "lora_rank": 8}, "rank 4"),
        ({"student_checkpoint_path": str(tmp_path)}, "data-root"),
        ({"student_checkpoint_path": str(models.teacher)}, "no PEFT adapter"),
    ):
        run = Run(tmp_path / said, models, options=options)
        with pytest.raises(FatalJobError, match=said):
            run.go()


@pytest.mark.parametrize("section", ["model", "options"])
def test_a_run_that_goes_on_needs_what_it_started_from_no_more(
    tmp_path: Path, models: Models, section: str
) -> None:
    first = Run(models.root / f"first-{section}", models, rows=14)
    first.go()
    adapter = first.artifact("adapter")
    run = Run(tmp_path, models, rows=14, **{section: {"student_checkpoint_path": str(adapter)}})
    run._changes["trainer"] = after(1, Broken(), "optim_step")
    with pytest.raises(Broken):
        run.go()
    adapter.rename(tmp_path / "elsewhere")
    run._changes.clear()
    run.go()
    begun, learnt = run.metrics()[0], first.metrics()[-1]
    assert begun["eval/kl"] == pytest.approx(learnt["eval/kl"], rel=1e-3)
    assert run.metrics()[-1]["step"] == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and make gpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_a_gpu(tmp_path: Path, models: Models, dtype: str) -> None:
    device = {"device": "cuda", "dtype": dtype}
    options = {"save_every": 2, "compute_post_kl": True, **teacher(models, parameters=device)}
    run = Run(tmp_path, models, options=options, model={"parameters": device})
    run._changes["trainer"] = after(4, Broken(), "optim_step")
    with pytest.raises(Broken):
        run.go()
    run._changes.clear()
    run.go()
    assert run.events("train.resumed") == [{"step": 4}]
    records = run.metrics()
    assert [record["step"] for record in records] == list(range(7))
    assert all(math.isfinite(record["loss"]) for record in records[1:])
    assert run.artifact("adapter/adapter_model.safetensors").is_file()


def first_step(tmp_path: Path, models: Models, **options: Any) -> tuple[dict[str, Any], Run]:
    """The record of a run's only step. The rate keeps the weights where they are."""
    given = {"learning_rate": 1e-12, **teacher(models, **SAMPLED), **options}
    folder = tmp_path / "-".join(f"{name}={value}" for name, value in options.items())
    run = Run(folder, models, rows=6, options=given)
    run.go()
    _, record = run.metrics()
    return record, run


def test_every_option_does_what_it_says(tmp_path: Path, models: Models) -> None:
    plain, run = first_step(tmp_path, models)
    assert (plain["samples"], plain["length_max"] <= 6) == (8, True)
    config = json.loads(run.artifact("adapter/adapter_config.json").read_bytes())
    assert config["r"] == 4

    halved, _ = first_step(tmp_path, models, kl_penalty_coef=0.5)
    assert halved["kl"] == pytest.approx(plain["kl"])
    assert halved["loss"] == pytest.approx(plain["loss"] / 2, rel=1e-4)

    discounted, _ = first_step(tmp_path, models, kl_discount_factor=0.9)
    assert discounted["kl"] == pytest.approx(plain["kl"])
    assert abs(discounted["advantage_mean"]) > abs(plain["advantage_mean"])

    clipped, _ = first_step(tmp_path, models, advantage_clip=0.01)
    assert clipped["advantage_std"] <= 0.01

    centred, _ = first_step(tmp_path, models, baseline="position")
    assert centred["advantage_mean"] == pytest.approx(0, abs=1e-6)

    same, _ = first_step(tmp_path, models, loss_fn="ppo")
    assert same["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    # The second part of a batch meets a policy that is not the one that sampled it any more.
    moving = {"num_substeps": 2, "learning_rate": 0.1}
    losses = set()
    for loss_fn in ("importance_sampling", "ppo", "cispo"):
        record, _ = first_step(tmp_path, models, loss_fn=loss_fn, **moving)
        assert record["kl"] == pytest.approx(plain["kl"])
        losses.add(round(record["loss"], 3))
    assert len(losses) == 3, losses

    short, run = first_step(tmp_path, models, max_tokens=2, group_size=3, lora_rank=2)
    assert (short["samples"], short["length_max"]) == (12, 2)
    assert json.loads(run.artifact("adapter/adapter_config.json").read_bytes())["r"] == 2

    still, _ = first_step(tmp_path, models, compute_post_kl=True)
    assert still["post_kl"] == pytest.approx(0, abs=1e-5)
    moved, _ = first_step(tmp_path, models, compute_post_kl=True, learning_rate=0.1)
    assert moved["post_kl"] > 1e-3

    other, _ = first_step(tmp_path, models, seed=6)
    assert other["kl"] != plain["kl"]
    again, _ = first_step(tmp_path / "again", models)
    assert without_times([again]) == without_times([plain])


class FakeRepo:
    """Remembers what was pushed."""

    def __init__(self) -> None:
        self.asked = 0
        self.files: dict[str, bytes] = {}

    def check_access(self) -> None:
        self.asked += 1

    def push(self, files: Mapping[str, Path], message: str) -> str:
        self.files = {name: path.read_bytes() for name, path in files.items()}
        return "https://hub.example/me/adapter"


def test_the_adapter_is_published_with_its_checkpoints(tmp_path: Path, models: Models) -> None:
    repo = FakeRepo()
    run = Run(
        tmp_path,
        models,
        rows=18,
        options={"save_every": 2},
        output={"mode": "upload_hf", "hf": {"repo_id": "me/adapter"}},
        changes={"repo": lambda _: lambda ctx: repo},
    )
    result = run.go(secrets={"HF_TOKEN": "t"}).result
    assert repo.asked == 1
    assert result.remote_artifact == "https://hub.example/me/adapter"
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    checkpoints = {f"checkpoints/step-{n:06d}/{name}" for n in (2, 4) for name in adapter}
    assert repo.files.keys() == adapter | checkpoints | {"README.md", "metrics.jsonl", "curves.png"}
    assert b"4" in repo.files["README.md"]
