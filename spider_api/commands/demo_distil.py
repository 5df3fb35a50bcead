"""The second part of ``spider demo``: a student learns to add from a teacher that can."""

from __future__ import annotations

__all__ = ["run_distillation"]

import json
from pathlib import Path

from spider_api.commands.demo_job import DemoFleet, run_job
from spider_api.commands.reporting import Reporter
from spider_sdk.bundle import load_function
from spider_sdk.cli.state import State
from spider_sdk.client import Client
from spider_sdk.errors import JobFailed

SCORE = "eval/score"


def run_distillation(state: State, say: Reporter, fleet: DemoFleet, folder: Path) -> None:
    """Train, download what came of it into ``folder`` and show how accuracy went.

    Raises JobFailed and JobCancelled.
    """
    shipped = fleet.shipped
    changes = {
        "model": {"name": str(shipped / "student")},
        "source": {"dataset": str(shipped / "sums.jsonl")},
        "generation": {"on_policy_options": {"teacher": {"name": str(shipped / "teacher")}}},
    }
    with Client(
        shipped / "distil.yaml",
        base_url=fleet.base_url,
        api_key=fleet.api_key,
        evaluator=load_function(f"{shipped / 'processors.py'}:score_sum"),
    ) as client:
        say.status("demo", "score is the student's accuracy on sums that no training has seen")
        job_id = run_job(client, state, say, shipped / "distil.yaml", changes)
        client.download_artifacts(job_id, folder)
    _show(state, say, folder)


def _show(state: State, say: Reporter, folder: Path) -> None:
    scores = _scores(folder / "metrics.jsonl")
    if not scores:
        raise JobFailed(f"{folder / 'metrics.jsonl'} has no {SCORE}: the student was not evaluated")
    (_, before), (steps, after) = scores[0], scores[-1]
    places = {
        name: str((folder / file).absolute())
        for name, file in (
            ("adapter", "adapter"), ("metrics", "metrics.jsonl"), ("curves", "curves.png")
        )
    }  # fmt: skip
    say.document("distilled", before=before, after=after, steps=steps, **places)
    if state.json:
        return
    state.say(f"\nThe student's accuracy: {before:.1%} → {after:.1%} in {steps} steps")
    for name, place in places.items():
        state.say(f"{name.capitalize() + ':':<9}{place}")
    state.say("")


def _scores(metrics: Path) -> list[tuple[int, float]]:
    """``(step, accuracy)`` of every evaluation, the first before any training."""
    with metrics.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [(record["step"], record[SCORE]) for record in records if SCORE in record]
