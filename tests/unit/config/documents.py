"""Documents that tests start from."""

from __future__ import annotations

import copy
from typing import Any

_JOB = {
    "model": {"provider": "vllm", "name": "owner/model"},
    "source": {"dataset": "owner/rows", "field": "question"},
}


def job(**sections: Any) -> dict[str, Any]:
    """A small valid job, each of ``sections`` merged into its own."""
    document = copy.deepcopy(_JOB)
    for name, section in sections.items():
        if isinstance(section, dict):
            document[name] = {**document.get(name, {}), **section}
        else:
            document[name] = section
    return document


def complete_job() -> dict[str, Any]:
    """A valid job that gives every key of an off-policy job."""
    return {
        "model": {
            "provider": "openai",
            "name": "owner/model",
            "parameters": {"timeout": 3, "nothing": None},
            "base_url": "http://127.0.0.1:8000/v1",
            "api_key_env": "MY_KEY",
            "pricing": {"input_per_million": 0.1, "output_per_million": 2},
        },
        "source": {
            "dataset": "rows.jsonl",
            "config_name": "main",
            "split": "train[0:10]",
            "field": "question",
            "revision": "v1",
            "streaming": True,
            "max_examples": 10,
            "shuffle": 7,
            "options": {"data_files": {"train": ["rows.jsonl"]}},
            "inputs": [{"name": "rows.jsonl", "sha256": "0" * 64}],
        },
        "generation": {
            "parameters": {"temperature": 0.7, "stop": None},
            "on_policy": False,
            "duplications": 2,
            "max_batch_size": 64,
            "seed": 2**63 + 1,
            "system_prompt": "Be brief.",
            "upload_every": 100,
        },
        "output": {
            "mode": "upload_hf",
            "local_path": "out.parquet",
            "format": "parquet",
            "hf": {
                "repo_id": "me/rows",
                "repo_type": "dataset",
                "private": True,
                "config_name": "a",
            },
        },
        "metadata": {"anything": [1, None, {"deep": True}]},
        "runtime": {"packages": ["numpy>=2"], "env": {"TZ": "UTC"}},
        "pre_processor": {"name": "pre", "source": "def pre(row): ...", "kwargs": {"n": 1}},
        "post_processor": {"name": "post", "source": "def post(row): ..."},
        "tools": [{"name": "add", "source": "def add(a): ...", "json_schema": {"type": "object"}}],
        "parallelism": 4,
        "shard_size": 256,
    }
