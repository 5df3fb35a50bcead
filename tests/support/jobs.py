"""Off-policy jobs for tests of the fleet: rows uploaded as an input, a scripted endpoint."""

from __future__ import annotations

import collections
import hashlib
import io
import json
from typing import Any

from spider_worker.fleet import Fleet


def upload_rows(fleet: Fleet, count: int, text: str = "row {}") -> dict[str, Any]:
    """A ``source`` section for ``count`` rows ``{"prompt": text}``."""
    data = "".join(json.dumps({"prompt": text.format(i)}) + "\n" for i in range(count)).encode()
    digest = hashlib.sha256(data).hexdigest()
    if not fleet.inputs.has(digest):
        fleet.inputs.put(digest, io.BytesIO(data))
    return {
        "dataset": "rows.jsonl",
        "field": "prompt",
        "inputs": [{"name": "rows.jsonl", "sha256": digest}],
    }


def openai_job(
    base_url: str,
    source: dict[str, Any],
    *,
    shard_size: int = 500,
    in_flight: int = 64,
    **extra: Any,
) -> dict[str, Any]:
    """A job document for the scripted OpenAI-compatible server."""
    return {
        "model": {"provider": "openai", "name": "scripted", "base_url": base_url},
        "source": source,
        "generation": {"parameters": {"max_tokens": 16}, "max_batch_size": in_flight},
        "output": {"mode": "return"},
        "shard_size": shard_size,
        **extra,
    }


def check_rows(records: list[dict[str, Any]], count: int, text: str = "row {}") -> None:
    """Nothing lost, nothing twice, and each answer belongs to its row."""
    found = collections.Counter(record["index"] for record in records)
    assert [i for i, n in found.items() if n > 1] == [], "duplicate rows"
    assert [i for i in range(count) if i not in found] == [], "lost rows"
    assert len(found) == count
    for record in records:
        assert record["error"] is None, record
        assert record["completion"] == "echo: " + text.format(record["index"])
