"""What a whole job publishes, and what of it is to be learnt."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.utils
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spider_worker.trajectories.messages import convert
from tests.contract.swe_agent.conftest import Job, Warm, mending
from tests.support.hub_emulator import USER, WRITE_TOKEN, HubEmulator
from tests.support.swe_repos import SweRepo

_numbers = itertools.count()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubEmulator]:
    with HubEmulator() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        huggingface_hub.utils.disable_progress_bars()
        yield hub
        huggingface_hub.utils.enable_progress_bars()
        huggingface_hub.close_session()


def published(hub: HubEmulator, repo_id: str) -> dict[str, pa.Table]:
    """The tables of a data set, by the names of their files."""
    return {
        name: pq.read_table(io.BytesIO(blob.content))
        for name, blob in hub.repo(repo_id).files.items()
        if name.endswith(".parquet")
    }


def test_a_job_publishes_what_its_agents_resolved_without_its_keys(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str, hub: HubEmulator
) -> None:
    able, idle = repos[:2]
    leak = {"call": "terminal", "args": {"command": f"echo the-real-key; echo {WRITE_TOKEN}"}}
    parts = {able.folder.name: [leak, *mending(able)], idle.folder.name: [{"text": "Fine."}]}
    job = Job(folder, warm, [able, idle], python, parts, secrets={"HF_TOKEN": WRITE_TOKEN})
    repo_id = f"{USER}/job-{next(_numbers)}"
    job.run(evaluate=True, push_filter="resolved", hf_repo_id=repo_id, messages_format="openai")
    result = job.result.result
    assert result.remote_artifact == f"{hub.endpoint}/datasets/{repo_id}"
    assert result.message.endswith("; 1 pushed")
    ((name, table),) = published(hub, repo_id).items()
    assert name == "data/scripted_tasks_30iter/train-00000.parquet"
    (row,) = table.to_pylist()
    assert (row["instance_id"], row["resolved"]) == (able.instance_id, True)
    assert row["train"] == [message["role"] == "assistant" for message in row["messages"]]
    assert "[REDACTED:job-secret]" in str(row["messages"])
    content = str(table.to_pylist()) + hub.repo(repo_id).files["README.md"].content.decode()
    assert "the-real-key" not in content
    assert WRITE_TOKEN not in content
    (warning,) = [data for _, code, _, data in job.ctx.events if code == "push.redacted"]
    assert set(warning["instances"]) == {able.instance_id}


def test_calls_that_came_to_nothing_are_not_learnt(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str
) -> None:
    repo = repos[0]
    parts = {
        repo.folder.name: [
            {"call": "terminal", "args": "{broken"},
            {"call": "no_such_tool", "args": {}},
            {"calls": [("terminal", {"command": "ls"}), ("terminal", {"order": "ls"})]},
            {"call": "terminal", "args": {"command": "ls"}},
        ]
    }
    (record,) = Job(folder, warm, [repo], python, parts).run()
    said = convert(record["messages"], "openai", record["history"])
    turns = [
        (flag, [call["function"] for call in message["tool_calls"] or ()])
        for message, flag in zip(said.messages, said.train, strict=True)
        if message["role"] == "assistant"
    ]
    assert [flag for flag, _ in turns] == [False, False, False, True, True]
    assert "_openhands_malformed_tool_call" in json.loads(turns[0][1][0]["arguments"])
    assert convert(record["messages"], "text", record["history"]).train.count(True) == 2
