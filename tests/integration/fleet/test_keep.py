"""Files that a unit commits while it runs: checkpoints, under the fence."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spider_sdk.errors import LeaseLost
from spider_worker.fleet import Claim, Fleet
from spider_worker.runner.context import ClaimContext, JobSession
from tests.support.units import claim, plan, submit


def context(fleet: Fleet, held: Claim) -> ClaimContext:
    session: Any = SimpleNamespace(job_id=held.job_id, secrets={}, cancelled=asyncio.Event())
    typed: JobSession = session
    return ClaimContext(fleet, typed, held, lambda _: None)


def file(ctx: ClaimContext, name: str, text: str) -> Path:
    path = ctx.scratch / name
    path.write_text(text)
    return path


@pytest.fixture
def held(fleet: Fleet) -> Claim:
    job = submit(fleet)
    plan(fleet, job)
    return claim(fleet, job)


def test_files_and_state_come_together_and_the_dropped_go(fleet: Fleet, held: Claim) -> None:
    ctx = context(fleet, held)
    first = {
        "state/step-1/model.bin": file(ctx, "a", "one"),
        "checkpoints/step-1/model.bin": file(ctx, "b", "kept"),
    }
    ctx.keep(first, {"step": 1})
    old = ctx.artifact("state/step-1/model.bin")
    assert old is not None
    assert old.read_text() == "one"
    ctx.keep({"state/step-2/model.bin": file(ctx, "a", "two")}, {"step": 2}, drop=list(first)[:1])
    assert ctx.load_state() == {"step": 2}
    assert ctx.artifact("state/step-1/model.bin") is None
    assert not old.exists()
    names = {entry.name for entry in fleet.artifacts.list(held.job_id)}
    assert names == {"state/step-2/model.bin", "checkpoints/step-1/model.bin"}
    kept = ctx.artifact("checkpoints/step-1/model.bin")
    assert kept is not None
    assert kept.read_text() == "kept"


def test_a_stale_writer_is_refused_whole(fleet: Fleet, held: Claim) -> None:
    ctx = context(fleet, held)
    ctx.keep({"state/a": file(ctx, "a", "mine")}, {"step": 1})
    fleet.units.release(held, "taken back")
    again = claim(fleet, held.job_id)
    assert again.unit == held.unit
    with pytest.raises(LeaseLost):
        ctx.keep({"state/b": file(ctx, "b", "late")}, {"step": 2}, drop=["state/a"])
    late = context(fleet, again)
    assert late.load_state() == {"step": 1}
    mine = late.artifact("state/a")
    assert mine is not None
    assert mine.read_text() == "mine"
    assert late.artifact("state/b") is None


def test_the_same_call_again_changes_nothing(
    fleet: Fleet, held: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an answer that was lost: the files have moved already."""
    ctx = context(fleet, held)
    files = {"state/a": file(ctx, "a", "mine")}
    keep = fleet.units.keep

    def lost(*args: Any, **options: Any) -> None:
        keep(*args, **options)
        raise ConnectionError

    monkeypatch.setattr(fleet.units, "keep", lost)
    with pytest.raises(ConnectionError):
        ctx.keep(files, {"step": 1})
    monkeypatch.undo()
    ctx.keep(files, {"step": 1})
    found = ctx.artifact("state/a")
    assert found is not None
    assert found.read_text() == "mine"
