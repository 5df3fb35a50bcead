"""What LiteLLM sends to providers that take more than a key, where they are reached with what
``make_llm`` keeps in memory."""

from __future__ import annotations

import json
import os
import subprocess
from urllib.parse import unquote

import pytest

from spider_worker.agents.interpreter import QUIET, library
from tests.support.scripted_server import Answer, ScriptedServer, Seen, answer_json

SCRIPT = """
import json, os, sys
sys.path.insert(0, {library!r})
from openhands.sdk import Message, TextContent
from spider_agent.llm import make_llm
message = Message(role="user", content=[TextContent(text="Hello.")])
for case in json.loads(sys.stdin.read()):
    made = make_llm({{"model": case["model"], "num_retries": 0, "variables": case["variables"]}})
    try:
        said = made.completion(messages=[message]).message.content[0].text
    except Exception as error:
        said = repr(error)
    leaked = [name for name in case["variables"] if name in os.environ]
    print("said", json.dumps([case["model"], said, leaked]), flush=True)
"""
OPENAI = {
    "id": "c", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hi."}}
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}  # fmt: skip
CONVERSE = {
    "output": {"message": {"role": "assistant", "content": [{"text": "Hi."}]}},
    "stopReason": "end_turn",
    "usage": {"inputTokens": 1, "outputTokens": 1, "totalTokens": 2},
}
BEDROCK = "anthropic.claude-3-5-sonnet-20240620-v1:0"
DATABRICKS = "databricks/databricks-meta-llama-3-3-70b-instruct"


@pytest.fixture(scope="module")
def told(python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """What each provider's service has seen, by the model; LiteLLM takes seconds to import, and is
    asked for all in one process."""
    folder = tmp_path_factory.mktemp("providers")
    script = SCRIPT.format(library=str(library(folder)))
    env = {**QUIET, "PATH": os.environ["PATH"], "HOME": str(folder)}
    seen: dict[str, Seen] = {}
    with ScriptedServer() as server:
        server.otherwise = _answer
        cases = _cases(server.url)
        done = subprocess.run(
            [python, "-I", "-c", script],
            input=json.dumps(cases), env=env, capture_output=True, text=True,
        )  # fmt: skip
        said = [json.loads(line[5:]) for line in done.stdout.splitlines() if line[:5] == "said "]
        assert said == [[case["model"], "Hi.", []] for case in cases], done.stderr[-4000:]
        for case, request in zip(cases, _asked(server.seen), strict=True):
            seen[str(case["model"])] = request
    return seen


def _answer(seen: Seen) -> Answer:
    return answer_json(CONVERSE if seen.path.endswith("/converse") else OPENAI)


def _asked(seen: list[Seen]) -> list[Seen]:
    return [one for one in seen if one.method == "POST"]


def _cases(url: str) -> list[dict[str, object]]:
    return [
        {
            "model": DATABRICKS,
            "variables": {"DATABRICKS_API_KEY": "dbx-1", "DATABRICKS_API_BASE": url},
        },
        {
            "model": "azure_ai/mistral-large",
            "variables": {
                "AZURE_AI_API_KEY": "ai-1",
                "AZURE_AI_API_BASE": url,
                "AZURE_API_VERSION": "2031-01-01",
            },
        },
        {
            "model": "watsonx/mistralai/mistral-large",
            "variables": {
                "WATSONX_TOKEN": "wx-1",
                "WATSONX_URL": url,
                "WATSONX_PROJECT_ID": "project-7",
            },
        },
        {
            "model": f"bedrock/{BEDROCK}",
            "variables": {
                "AWS_BEARER_TOKEN_BEDROCK": "bearer-1",
                "AWS_REGION": "eu-north-1",
                "AWS_BEDROCK_RUNTIME_ENDPOINT": url,
            },
        },
    ]


def test_databricks(told: dict[str, Seen]) -> None:
    assert told[DATABRICKS].headers["authorization"] == "Bearer dbx-1"


def test_azures_other_models(told: dict[str, Seen]) -> None:
    seen = told["azure_ai/mistral-large"]
    assert "ai-1" in (seen.headers.get("api-key"), seen.headers["authorization"].split()[-1])
    assert "api-version=2031-01-01" in seen.query


def test_watsonx(told: dict[str, Seen]) -> None:
    seen = told["watsonx/mistralai/mistral-large"]
    assert seen.headers["authorization"] == "Bearer wx-1"
    assert seen.json["project_id"] == "project-7"


def test_bedrock_by_its_bearer_token(told: dict[str, Seen]) -> None:
    seen = told[f"bedrock/{BEDROCK}"]
    assert seen.headers["authorization"] == "Bearer bearer-1"
    assert unquote(seen.path) == f"/model/{BEDROCK}/converse"
