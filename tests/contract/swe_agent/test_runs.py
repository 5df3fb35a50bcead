"""Which runs a job makes, and what of its options reaches the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spider_sdk.errors import FatalJobError
from tests.contract.swe_agent.conftest import Job, Warm, mending
from tests.support.swe_repos import SweRepo


def test_independent_runs_of_an_instance(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str
) -> None:
    able, idle = repos[:2]
    parts = {able.folder.name: mending(able), idle.folder.name: [{"text": "It is fine."}]}
    job = Job(folder, warm, [able, idle], python, parts)
    records = job.run(n_attempts=2, temperature=0.25)
    assert sorted((one["instance_id"], one["n"], one["status"]) for one in records) == sorted(
        (repo.instance_id, n, status)
        for repo, status in ((able, "finished"), (idle, "empty_patch"))
        for n in (0, 1)
    )
    assert all(one["attempt"] == 1 for one in records)
    logs = {path.name for path in (folder / "job/artifacts/infer_logs").iterdir()}
    assert logs == {
        f"instance_{repo.instance_id}{run}.log" for repo in (able, idle) for run in ("", ".run1")
    }
    assert job.store["rows_total"] == 4
    assert job.model is not None
    assert {request["temperature"] for request in job.model.requests} == {0.25}


def test_runs_that_are_left_out_are_not_made(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str
) -> None:
    one, other = repos[:2]
    answer = [{"text": "It is fine."}]
    parts = {one.folder.name: answer, other.folder.name: answer}
    done = [[one.instance_id, 0], [one.instance_id, 1], [other.instance_id, 1], ["unknown", 0]]
    text = "".join(json.dumps(key) + "\n" for key in done)
    job = Job(folder, warm, [one, other], python, parts, files={"done.jsonl": text})
    (record,) = job.run(n_attempts=2, leave_out="done.jsonl")
    assert (record["instance_id"], record["n"]) == (other.instance_id, 0)
    assert job.store["rows_total"] == 1


def test_a_job_of_which_all_is_done_ends_at_once(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str
) -> None:
    text = json.dumps([repos[0].instance_id, 0]) + "\n"
    job = Job(folder, warm, repos[:1], python, {}, files={"done.jsonl": text})
    assert job.run(leave_out="done.jsonl") == []
    assert job.model is not None
    assert not job.model.requests


@pytest.mark.parametrize(
    ("named", "text", "said"),
    [
        ("other.jsonl", "", "other.jsonl was not uploaded"),
        ("done.jsonl", '["a", 0]\n{"a": 0}\n', r"done.jsonl, line 2: expected"),
        ("done.jsonl", "[", r"done.jsonl, line 1: expected"),
    ],
)
def test_a_list_that_is_none_is_said(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str, named: str, text: str, said: str
) -> None:
    job = Job(folder, warm, repos[:1], python, {}, files={"done.jsonl": text})
    with pytest.raises(FatalJobError, match=said):
        job.run(leave_out=named)
