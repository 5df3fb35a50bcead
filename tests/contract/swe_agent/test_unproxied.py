"""Whole jobs whose agents reach their model by themselves, with what its provider takes."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.contract.swe_agent.conftest import Job, Warm, mending
from tests.support.scripted_server import ScriptedServer, answer_json
from tests.support.swe_repos import SweRepo

AZURE = {"AZURE_API_KEY": "azure-key-5d81c2", "AZURE_API_VERSION": "2025-01-01"}
AWS = {
    "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE7",
    "AWS_SECRET_ACCESS_KEY": "aws-secret-3e90b7",
    "AWS_REGION": "eu-north-1",
}
#: Its own environment, that of all its ancestors, and what lies in its own folders.
SEARCH = (
    r"cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\0' '\n'; env; "
    "grep -rlsF azure-''key /tmp/*agent-state* $HOME . 2>/dev/null "
    "| sed 's/^/lies''-in /'; echo looked-$((1 + 1))"
)


@pytest.mark.parametrize("workspace", ["bwrap", "local"])
def test_azures_key_opens_its_own_protocol_and_is_nowhere_that_an_agent_looks(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str, workspace: str
) -> None:
    repo = repos[0]
    turns = [{"call": "terminal", "args": {"command": SEARCH}}, *mending(repo)]
    job = Job(
        folder, warm, [repo], python, {repo.folder.name: turns},
        settings={"allow_local_workspace": True}, secrets=AZURE,
    )  # fmt: skip
    (record,) = job.run(
        llm_model="azure/mine",
        llm_base_url=None,
        llm_api_key_env=None,
        workspace=workspace,
        evaluate=True,
    )
    assert (record["status"], record["resolved"]) == ("finished", True), record["error"]
    assert job.model is not None
    assert set(job.model.keys) == {AZURE["AZURE_API_KEY"]}
    seen = json.dumps([job.model.requests, record])
    assert "looked-2" in seen
    assert "PATH=" in seen
    assert AZURE["AZURE_API_KEY"] not in seen
    assert "lies-in" not in seen
    assert record["metrics"]["accumulated_cost"] > 0


def test_bedrock_is_asked_with_a_signature_of_the_jobs_own_keys(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str
) -> None:
    said = {"toolUse": {"toolUseId": "t1", "name": "finish", "input": {"message": "Done."}}}
    answer = {
        "output": {"message": {"role": "assistant", "content": [said]}},
        "stopReason": "tool_use",
        "usage": {"inputTokens": 100, "outputTokens": 10, "totalTokens": 110},
    }
    with ScriptedServer() as bedrock:
        bedrock.otherwise = lambda seen: answer_json(answer)
        secrets = {**AWS, "AWS_BEDROCK_RUNTIME_ENDPOINT": bedrock.url}
        job = Job(folder, warm, repos[:1], python, {}, secrets=secrets)
        name = "anthropic.claude-3-5-sonnet-20240620-v1:0"
        (record,) = job.run(llm_model=f"bedrock/{name}", llm_base_url=None, llm_api_key_env=None)
    assert record["status"] == "empty_patch", record["error"]
    (seen,) = bedrock.seen
    assert unquote(seen.path) == f"/model/{name}/converse"
    signed = seen.headers["authorization"]
    assert f"Credential={AWS['AWS_ACCESS_KEY_ID']}/" in signed
    assert "/eu-north-1/bedrock/" in signed
    assert AWS["AWS_SECRET_ACCESS_KEY"] not in json.dumps([signed, record])
