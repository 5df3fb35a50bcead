"""How an attempt ends, what is kept of it, and whether another is paid for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.errors import WorkspaceError
from spider_worker.agents.episode import Heard
from spider_worker.agents.hosts import WarmHost
from spider_worker.pipelines.swe_agent import attempts
from spider_worker.workspaces import repository
from tests.contract.swe_agent.conftest import PRICE, Job, Warm, mending
from tests.support.agent_model import Turn
from tests.support.swe_repos import SweRepo

CALL = 110 * PRICE
#: The model's service broke, and neither the SDK nor the judge of what is worth a retry says more.
BROKEN: Turn = {"status": 409, "message": "scripted trouble"}


def shell(command: str) -> dict[str, object]:
    return {"call": "terminal", "args": {"command": command}}


@pytest.fixture
def job(folder: Path, warm: Warm, repos: list[SweRepo], python: str) -> Job:
    return Job(folder, warm, repos[:1], python, {})


def play(job: Job, *turns: Turn, **options: Any) -> list[dict[str, Any]]:
    job.parts = {job.repos[0].folder.name: list(turns)}
    return job.run(**options)


def statuses(records: list[dict[str, Any]]) -> list[str]:
    return [record["status"] for record in records]


def test_the_cap_of_an_instance_is_that_of_its_attempts_together(job: Job) -> None:
    turns = (shell("echo 1"), shell("echo 2"), BROKEN)
    cap = 4.5 * CALL
    records = play(job, *turns, max_retries=5, max_budget_per_instance=cap)
    # Two turns, two turns, and of the third attempt the one that goes over the cap.
    assert statuses(records) == ["llm_error", "llm_error", "max_budget"]
    assert sum(one["metrics"]["accumulated_cost"] for one in records) == pytest.approx(5 * CALL)


def test_nothing_is_begun_that_cannot_be_paid(job: Job) -> None:
    turns = (shell("echo 1"), shell("echo 2"), BROKEN)
    # So little is left that the agent takes it for something.
    records = play(job, *turns, max_retries=5, max_budget_per_instance=4 * CALL + 1e-10)
    assert statuses(records) == ["llm_error", "max_budget"]
    assert re.search(r"\$0.44 for an instance are used up; .*scripted", records[1]["error"])
    assert job.result.counters()["rows_ok"] == 1, "another run would end the same way"


def test_a_call_that_is_broken_off_takes_all_that_is_left_of_a_cap(job: Job) -> None:
    job.parts = {job.repos[0].folder.name: [shell("echo first"), {"hang": True}]}
    job.break_off(2, cancel=True, max_budget_per_instance=4.0)
    (shard,) = job.store.shards()
    (record,) = [json.loads(line) for line in shard.path.read_text().splitlines()]
    assert (record["status"], record["metrics"]["accumulated_cost"]) == ("cancelled", None)
    assert shard.counters["cost_usd"] == 4.0


def test_a_wrong_request_is_not_sent_again_in_the_same_job(job: Job) -> None:
    records = play(job, shell("ls"), {"status": 400}, max_retries=2)
    assert statuses(records) == ["llm_refused"]
    counters = job.result.counters()
    assert (counters["rows_error"], counters["rows_ok"]) == (1, 0)
    # Where it is run again, it may be another endpoint.
    assert statuses(play(job, *mending(job.repos[0]), retry=True)) == ["llm_refused", "finished"]


def test_a_conversation_that_is_too_long_is_done(job: Job) -> None:
    said = "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens"
    turns = (shell("echo 1 > made.txt"), {"status": 400, "message": said})
    (record,) = play(job, *turns, max_retries=2)
    assert record["status"] == "context_window"
    assert "made.txt" in record["test_result"]["git_patch"]
    assert job.result.counters()["rows_ok"] == 1


def test_a_patch_that_is_too_large_is_the_agents_doing(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository, "PATCH_BYTES", 1 << 20)
    turn = shell("head -c 3000000 /dev/zero | tr '\\0' x > big.txt")
    (record,) = play(job, turn, max_retries=2)
    assert (record["status"], record["test_result"]["git_patch"]) == ("unusable_patch", None)
    assert "more than 1 MiB" in record["error"]
    assert "big.txt" in str(record["messages"])
    assert job.result.counters()["rows_ok"] == 1


def test_what_an_agent_ran_out_of_stays_where_its_patch_cannot_be_had(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def take_patch(*_: object) -> str:
        raise WorkspaceError("the disk is gone")

    monkeypatch.setattr(attempts, "take_patch", take_patch)
    turns = [shell(f"echo {number}") for number in range(9)]
    (record,) = play(job, *turns, max_retries=2, max_iterations=2)
    assert record["status"] == "max_iterations"
    assert "the disk is gone" in record["error"]
    assert record["test_result"]["git_patch"] is None


def test_a_finished_run_whose_patch_cannot_be_had_is_tried_again(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def take_patch(*_: object) -> str:
        raise WorkspaceError("the disk is gone")

    monkeypatch.setattr(attempts, "take_patch", take_patch)
    records = play(job, shell("echo kept"), max_retries=1)
    assert statuses(records) == ["workspace_error", "workspace_error"]
    assert all("kept" in str(record["messages"]) for record in records)


def test_a_lost_pool_leaves_what_was_heard(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    run = WarmHost.run

    async def losing(self: WarmHost, *args: Any, **options: Any) -> Heard:
        tell = options.pop("listener")

        def listen(line: Any, heard: Heard) -> None:
            tell(line, heard)
            if line["op"] == "messages" and line["messages"][-1]["role"] == "tool":
                assert self._pool._process is not None
                self._pool._process.kill()

        return await run(self, *args, listener=listen, **options)

    monkeypatch.setattr(WarmHost, "run", losing)
    (record,) = play(job, shell("echo kept; echo 1 > made.txt"), {"hang": True})
    assert record["status"] == "agent_error"
    assert "kept" in str(record["messages"])
    assert "made.txt" in record["test_result"]["git_patch"]
    assert record["metrics"]["accumulated_token_usage"]["prompt_tokens"] == 100


def test_a_place_that_breaks_under_an_agent_leaves_what_was_heard(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = WarmHost.run

    async def breaking(self: WarmHost, *args: Any, **options: Any) -> Heard:
        await run(self, *args, **options)
        raise WorkspaceError("the container does not come back")

    monkeypatch.setattr(WarmHost, "run", breaking)
    (record,) = play(job, shell("echo kept"))
    assert (record["status"], record["error"]) == (
        "workspace_error",
        "the container does not come back",
    )
    assert "kept" in str(record["messages"])
