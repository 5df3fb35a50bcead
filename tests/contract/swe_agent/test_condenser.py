"""A whole job with the condenser: what the model is shown shrinks, and what it costs is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.contract.swe_agent.conftest import PRICE, Job, Warm
from tests.support.swe_repos import SweRepo


def shell(command: str) -> dict[str, Any]:
    return {"call": "terminal", "args": {"command": command}}


def test_a_condenser_summarises_and_is_paid_for(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str
) -> None:
    repo = repos[0]
    turns = [shell(f"echo step-{number}") for number in range(9)]
    job = Job(folder, warm, [repo], python, {repo.folder.name: turns})
    (record,) = job.run(condenser={"max_size": 10, "keep_first": 2}, max_iterations=14)
    assert record["status"] in ("empty_patch", "max_iterations"), record["error"]
    assert job.model is not None
    condensing = [one for one in job.model.requests if not one.get("tools")]
    assert condensing, "the condenser has asked for a summary"
    assert record["metadata"]["condenser_config"] == {"max_size": 10, "keep_first": 2}
    # What the model is shown at last lacks what it was shown before, and has the summary.
    last = str([one for one in job.model.requests if one.get("tools")][-1]["messages"])
    assert "step-0" not in last or "step-1" not in last
    answers = len(job.model.answers)
    metrics = record["metrics"]
    assert metrics["accumulated_cost"] == pytest.approx(answers * 110 * PRICE)
    assert metrics["accumulated_token_usage"]["prompt_tokens"] == answers * 100
