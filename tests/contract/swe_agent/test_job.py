"""Whole jobs of coding agents."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from unittest.mock import ANY

import pytest

from spider_sdk.errors import AuthError, EngineUnavailable, FatalJobError
from spider_worker.pipelines.swe_agent import pipeline
from spider_worker.trajectories.commit import spider_commit
from tests.contract.swe_agent.conftest import PRICE, Job, Warm, mending
from tests.support.swe_repos import SweRepo


def shell(command: str) -> dict[str, object]:
    return {"call": "terminal", "args": {"command": command}}


def test_agents_mend_what_they_can_and_are_judged(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = (f"2026-01-01T00:00:{second:02}+00:00" for second in range(60))
    monkeypatch.setattr(pipeline, "_now", lambda: next(times))
    able, idle, wrong = repos[:3]
    parts = {
        able.folder.name: mending(able),
        idle.folder.name: [{"text": "It is fine as it is."}],
        wrong.folder.name: [shell("echo nonsense > NOTES.md")],
    }
    job = Job(folder, warm, [able, idle, wrong], python, parts, {"evaluate": True})
    records = {record["instance_id"]: record for record in job.run()}
    mended, untouched, spoilt = (records[repo.instance_id] for repo in (able, idle, wrong))
    assert (mended["status"], mended["resolved"]) == ("finished", True), mended["report"]
    assert (untouched["status"], untouched["resolved"]) == ("empty_patch", False)
    assert (spoilt["status"], spoilt["resolved"]) == ("finished", False)
    assert "NOTES.md" in spoilt["test_result"]["git_patch"]
    assert mended["metrics"]["accumulated_cost"] == pytest.approx(4 * 110 * PRICE)
    # The history that the agent was shown is one commit, and nothing in the record gives more.
    seen = next(m for m in mended["messages"] if m["role"] == "tool")["content"]
    text = seen if isinstance(seen, str) else "".join(part["text"] for part in seen)
    assert "Start here" in text
    for record, repo in zip((mended, untouched, spoilt), (able, idle, wrong), strict=True):
        # As the row came, without the answer; nothing says where files lie on the worker.
        row = {k: v for k, v in repo.row().items() if k not in ("patch", "gold_patch")}
        digest = hashlib.sha256(repo.bundle.read_bytes()).hexdigest()
        row |= {"repo_source": f"input:{digest}", "problem_statement": ANY}
        assert record["instance"] == row
        assert str(folder) not in json.dumps(record)
    for record, repo in zip((untouched, spoilt), (idle, wrong), strict=True):
        assert repo.marker not in str(record["messages"]) + str(record["instance"])
    assert "1 of 3 judged are resolved" in job.result.result.message
    artifacts = folder / "job" / "artifacts"
    metadata = json.loads((artifacts / "metadata.json").read_text())
    # The time at which the job began, for all of it, and what it was made with.
    assert {metadata["start_time"]} == {one["metadata"]["start_time"] for one in records.values()}
    assert metadata["start_time"] == "2026-01-01T00:00:00+00:00"
    for document in (metadata, *(record["metadata"] for record in records.values())):
        assert document["details"].keys() >= {"spider", "openhands-sdk", "openhands-tools"}
        assert document["git_commit"] == spider_commit()
    logs = sorted(path.name for path in (artifacts / "infer_logs").iterdir())
    assert logs == sorted(f"instance_{repo.instance_id}.log" for repo in (able, idle, wrong))
    codes = [code for _, code, _, _ in job.ctx.events]
    assert codes.count("instance.started") == codes.count("instance.ended") == 3
    assert codes.count("instance.judging") == 3
    assert not list((warm.state / "swe-agent" / "boxes").iterdir())
    assert job.model is not None
    assert set(job.model.keys) == {"Bearer the-real-key"}


def test_a_name_with_the_protocols_prefix_is_the_servers_own_without_it(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str
) -> None:
    job = Job(folder, warm, repos[:1], python, {repos[0].folder.name: [shell("ls")]})
    (record,) = job.run(llm_model="openai/scripted")
    assert record["status"] == "empty_patch"
    assert job.model is not None
    assert {request["model"] for request in job.model.requests} == {"scripted"}
    (told,) = (one for one in job.ctx.events if one[1] == "model.name")
    assert told[2].endswith("has no openai/scripted, and is asked for scripted")


def test_what_was_the_endpoints_fault_is_tried_again(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str
) -> None:
    repo = repos[0]
    turns = [shell("echo a-$((1 + 1))"), {"status": 409, "message": "out of order"}]
    job = Job(folder, warm, [repo], python, {repo.folder.name: turns})
    records = job.run(max_retries=1)
    assert [record["status"] for record in records] == ["llm_error", "llm_error"]
    assert [record["attempt"] for record in records] == [1, 2]
    assert all("a-2" in str(record["messages"]) for record in records)
    path = folder / f"job/artifacts/infer_logs/instance_{repo.instance_id}.log"
    log = path.read_text()
    counters = job.result.counters()
    assert (counters["rows_error"], counters["rows_ok"]) == (1, 0)
    (told,) = (one for one in job.ctx.events if one[1] == "instance.retrying")
    assert "llm error, tried again: " in told[2]
    assert "out of order" in told[2]
    assert counters["cost_usd"] == pytest.approx(2 * 110 * PRICE)
    # A retry of the job tries what failed, and counts what that cost before.
    job.parts = {repo.folder.name: mending(repo)}
    records = job.run(max_retries=1, retry=True)
    assert [record["status"] for record in records] == ["llm_error", "llm_error", "finished"]
    assert records[-1]["attempt"] == 3
    assert job.result.counters()["rows_ok"] == 1
    assert job.result.counters()["cost_usd"] == pytest.approx(6 * 110 * PRICE)
    # The log goes on where it was.
    assert path.read_text().startswith(log)
    assert "attempt 3 ends: finished" in path.read_text().removeprefix(log)
    # Another finds nothing left to do.
    assert len(job.run(max_retries=1, retry=True)) == 3
    assert job.model is not None
    assert not job.model.requests
    text = re.sub(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d ", "@ ", log, flags=re.MULTILINE)
    said = [line for line in text.splitlines() if not line.startswith("    | ")]
    one = said.index("@ attempt 2 begins")
    assert said[0] == "@ attempt 1 begins"
    at = said.index('@ calls terminal {"command": "echo a-$((1 + 1))"}')
    assert said[at - 1 : at + 2] == ["@ turn 1", said[at], "@ terminal answers"]
    assert "a-2" in said[at + 2]
    (end,) = (n for n, line in enumerate(said) if line.startswith("@ attempt 1 ends"))
    assert said[end] == "@ attempt 1 ends: llm_error, 1 turns, $0.1100"
    assert "out of order" in said[end + 1]
    assert at < end < one


def test_a_lost_worker_leaves_a_partial_trajectory_and_what_it_cost(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str
) -> None:
    repo = repos[0]
    parts = {repo.folder.name: [shell("echo first"), {"hang": True}]}
    job = Job(folder, warm, [repo], python, parts)
    job.break_off(2)
    job.parts = {repo.folder.name: mending(repo)}
    lost, mended = job.run(max_retries=0)  # a worker that is lost takes no retry
    assert (lost["status"], lost["attempt"]) == ("agent_error", 1)
    assert "its worker was lost" in lost["error"]
    assert "first" in str(lost["messages"])
    assert lost["metrics"]["accumulated_cost"] == pytest.approx(110 * PRICE)
    assert (mended["status"], mended["attempt"]) == ("finished", 2)
    assert job.result.counters()["cost_usd"] == pytest.approx(5 * 110 * PRICE)


def test_a_cancelled_job_keeps_what_its_agents_did(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str
) -> None:
    repo = repos[0]
    parts = {repo.folder.name: [shell("echo first; echo 1 > made.txt"), {"hang": True}]}
    job = Job(folder, warm, [repo], python, parts)
    job.break_off(2, cancel=True)
    (shard,) = job.store.shards()
    (record,) = [json.loads(line) for line in shard.path.read_text().splitlines()]
    assert not shard.complete
    assert (record["status"], record["attempt"]) == ("cancelled", 1)
    assert "made.txt" in record["test_result"]["git_patch"]
    assert "first" in str(record["messages"])
    # Taken up again, it is tried anew.
    job.parts = {repo.folder.name: mending(repo)}
    records = job.run(retry=True)
    assert [one["status"] for one in records] == ["cancelled", "finished"]


def test_a_refused_key_ends_the_job(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str
) -> None:
    repo = repos[0]
    parts = {repo.folder.name: [{"status": 401, "message": "no such key"}]}
    with pytest.raises(AuthError, match=r"refused the key of scripted: .*no such key"):
        Job(
            folder, warm, repos[:3], python, {**parts, **{r.folder.name: [] for r in repos[1:3]}}
        ).run()


def test_what_cannot_work_is_said_before_any_money_is_spent(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(folder, warm, repos[:1], python, {repos[0].folder.name: []})

    def refused(error: type[Exception], match: str, **changes: object) -> None:
        with pytest.raises(error, match=match):
            job.run(**changes)
        assert job.model is not None
        assert not job.model.requests

    refused(FatalJobError, "no instance", instance_filter="nothing-like-it")
    refused(
        FatalJobError,
        "nobody knows what scripted costs",
        max_budget_per_instance=1.0,
        input_cost_per_token=None,
    )
    refused(
        FatalJobError, "needs a key", llm_base_url=None, llm_model="gpt-4o", llm_api_key_env=None
    )
    refused(FatalJobError, "no name that LiteLLM knows", llm_base_url=None, llm_model="my-own")
    refused(EngineUnavailable, "has not allowed", workspace="local")
    monkeypatch.setenv("PATH", str(folder))
    refused(EngineUnavailable, "docker", workspace="docker")
