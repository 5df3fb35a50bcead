"""Records of made-up runs, as a run of agents leaves them."""

from __future__ import annotations

__all__ = ["CONFIG", "TOOLS", "conversation", "record", "write_run"]

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spider_sdk.config.model import SweConfig
from spider_worker.trajectories.layout import METADATA, OUTPUT
from spider_worker.trajectories.metadata import run_metadata
from spider_worker.trajectories.output_file import append
from spider_worker.trajectories.record import build

CONFIG = SweConfig(
    llm_model="openai/gpt-4o",
    instance_filter="pylint.*",
    llm_base_url="http://10.0.0.7:8000/v1",
    llm_api_key="sk-aVerySecretKeyOfTheJob1234",
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "terminal",
            "description": "Run a command.",
            "parameters": {"type": "object", "properties": {"command": {"type": "string"}}},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "finish",
            "description": "Say that the work is done.",
            "parameters": {"type": "object", "properties": {"message": {"type": "string"}}},
        },
    },
]


def call(identity: str, name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": identity,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def conversation(arguments: str = '{"command": "ls"}') -> list[dict[str, Any]]:
    """What a model saw in three turns: two calls at once, one of them with ``arguments``."""
    return [
        {"role": "system", "content": [{"type": "text", "text": "You mend code."}]},
        {"role": "user", "content": [{"type": "text", "text": "The sum is wrong."}]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "I look around."}],
            "reasoning_content": "First the files.",
            "tool_calls": [
                call("c1", "terminal", arguments),
                call("c2", "terminal", '{"command": "pwd"}'),
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "name": "terminal", "content": "sum.py"},
        {
            "role": "tool",
            "tool_call_id": "c2",
            "name": "terminal",
            "content": [{"type": "text", "text": "/testbed"}],
        },
        {
            "role": "assistant",
            "tool_calls": [call("c3", "finish", '{"message": "done"}')],
        },
    ]


def record(instance_id: str = "pylint__one", **more: Any) -> dict[str, Any]:
    """A finished run; ``cost`` is its accumulated cost, ``resolved`` the verdict of a judge."""
    cost = more.pop("cost", 0.25)
    resolved = more.pop("resolved", None)
    values: dict[str, Any] = {
        "status": "finished",
        "instance": {
            "instance_id": instance_id,
            "repo": "swesmith/pylint",
            "image_name": "swebench/pylint:latest",
            "problem_statement": "The sum is wrong.",
            "patch": "the bug itself",
        },
        "metadata": run_metadata(CONFIG),
        "git_patch": "diff --git a/sum.py b/sum.py\n",
        "instruction": "Mend the sum.",
        "history": [{"kind": "MessageEvent", "source": "user"}],
        "metrics": {"accumulated_cost": cost, "accumulated_token_usage": {"prompt_tokens": 9}},
        "messages": conversation(),
        "tools": TOOLS,
        **more,
    }
    made = build(instance_id=instance_id, **values)
    made["resolved"] = resolved
    return made


def write_run(folder: Path, records: Iterable[dict[str, Any]]) -> Path:
    """A run's files; returns ``output.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    for one in records:
        append(folder / OUTPUT, one)
    (folder / METADATA).write_text(json.dumps(run_metadata(CONFIG)))
    return folder / OUTPUT
