"""Rows of the data set that is made from records, with one pinned type for every column.

Nothing is inferred: a column whose values are all null has its type all the same, or shards and
later additions would not fit together. What has no fixed shape (events, metrics, reports, the
definitions of tools) is JSON text, since nested Arrow columns give every row the union of all rows'
fields.
"""

from __future__ import annotations

__all__ = ["JSON_COLUMNS", "row", "schema"]

from collections.abc import Mapping
from typing import Any, Final

import pyarrow as pa

from spider_worker.sinks.jsonl import dump_record
from spider_worker.trajectories.layout import shown_name
from spider_worker.trajectories.messages import convert
from spider_worker.trajectories.record import Record

#: Columns of JSON text.
JSON_COLUMNS: Final = ("tools", "trajectory", "metrics", "report")

_FUNCTION: Final = pa.struct([("name", pa.string()), ("arguments", pa.string())])
_CALL: Final = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", _FUNCTION)])
_MESSAGE: Final = {
    "text": pa.struct([("role", pa.string()), ("content", pa.string())]),
    "openai": pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("reasoning_content", pa.string()),
            ("tool_calls", pa.list_(_CALL)),
            ("tool_call_id", pa.string()),
            ("name", pa.string()),
        ]
    ),
}


def schema(messages_format: str) -> pa.Schema:
    """The columns in their order. ``messages_format`` is ``text`` or ``openai``."""
    return pa.schema(
        [
            ("messages", pa.list_(_MESSAGE[messages_format])),
            ("tools", pa.string()),
            ("train", pa.list_(pa.bool_())),
            ("messages_format", pa.string()),
            ("trajectory", pa.string()),
            ("instance_id", pa.string()),
            ("repo", pa.string()),
            ("image_name", pa.string()),
            ("instruction", pa.string()),
            ("problem_statement", pa.string()),
            ("git_patch", pa.string()),
            ("status", pa.string()),
            ("error", pa.string()),
            ("resolved", pa.bool_()),
            ("report", pa.string()),
            ("metrics", pa.string()),
            ("cost", pa.float64()),
            ("model", pa.string()),
            ("agent_class", pa.string()),
            ("max_iterations", pa.int64()),
            ("dataset", pa.string()),
            ("split", pa.string()),
            ("n", pa.int64()),
            ("attempt", pa.int64()),
        ]
    )


def row(record: Record, messages_format: str, *, cost: float | None) -> dict[str, Any]:
    """One row, its columns those of ``schema``.

    ``cost`` is what the run of the instance has cost in US dollars over all its attempts, None
    where that is unknown; ``metrics`` are those of the last attempt alone. Of the instance, the
    fields of the task go in, the solution and the tests do not; of a model's or a data set's path
    the last part. Raises UsageError for a format that is none.
    """
    conversation = convert(record.messages, messages_format, record.history)
    instance, metadata = record.instance, record.metadata
    values = {
        "messages": conversation.messages,
        "tools": _json(record.tools),
        "train": conversation.train,
        "messages_format": messages_format,
        "trajectory": _json(record.history),
        "instance_id": record.instance_id,
        "repo": _text(instance.get("repo")),
        "image_name": _text(instance.get("image_name")),
        "instruction": record.instruction,
        "problem_statement": _text(instance.get("problem_statement")),
        "git_patch": record.git_patch,
        "status": record.status,
        "error": record.error,
        "resolved": record.resolved,
        "report": None if record.report is None else _json(record.report),
        "metrics": _json(record.metrics),
        "cost": cost,
        "model": _shown(record.model),
        "agent_class": _text(metadata.get("agent_class")),
        "max_iterations": _number(metadata.get("max_iterations")),
        "dataset": _shown(metadata.get("dataset")),
        "split": _text(metadata.get("data_split")),
        "n": record.n,
        "attempt": record.attempt,
    }
    return {name: _encodable(value) for name, value in values.items()}


def _json(value: Any) -> str:
    return dump_record(value).decode()


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _shown(name: Any) -> str | None:
    return None if name is None else shown_name(str(name))


def _number(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) else None


def _encodable(value: Any) -> Any:
    """``value`` with ``?`` for half of a surrogate pair, which UTF-8 (and so Arrow) cannot hold."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {name: _encodable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    return value
