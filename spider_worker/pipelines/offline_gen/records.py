"""Records: made once from a request and its answer, and encoded once."""

from __future__ import annotations

__all__ = ["ErrorText", "error_record", "good_record", "post_processed", "request_seed"]

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

from spider_sdk.errors import RowError
from spider_sdk.records import IDENTITY_FIELDS, RECORD_FIELDS, Record
from spider_worker.engines.base import Completion
from spider_worker.pipelines.rows.prompts import Prepared

_OWN = frozenset(RECORD_FIELDS)
_MASK = "***"


def request_seed(seed: int, index: int, sample: int) -> int:
    """A seed of 31 bits for one request, the same on every worker and every attempt."""
    text = f"{seed}:{index}:{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") & 0x7FFFFFFF


def good_record(index: int, sample: int, prepared: Prepared, completion: Completion) -> Record:
    usage = completion.usage
    record: Record = {
        "id": f"{index}-{sample}",
        "index": index,
        "sample": sample,
        "prompt": prepared.prompt,
        "messages": prepared.messages,
        "completion": completion.text,
        "reasoning_content": completion.reasoning,
        "finish_reason": completion.finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
        },
        "error": None,
    }
    _add_fields(record, prepared.fields)
    return record


def error_record(
    index: int,
    sample: int,
    fields: Mapping[str, Any],
    prepared: Prepared | None,
    error: Mapping[str, Any],
) -> Record:
    """``prepared`` is None where the row never became a prompt; ``error`` as ErrorText makes."""
    record: Record = {
        "id": f"{index}-{sample}",
        "index": index,
        "sample": sample,
        "prompt": prepared.prompt if prepared else None,
        "messages": prepared.messages if prepared else None,
        "completion": None,
        "reasoning_content": None,
        "finish_reason": None,
        "usage": None,
        "error": dict(error),
    }
    _add_fields(record, prepared.fields if prepared else fields)
    return record


def post_processed(record: Record, value: Mapping[str, Any], errors: ErrorText) -> Record:
    """What the post-processor made of a record: its dict, under the record's identity. An
    ``error`` that it set makes an error row."""
    made = {name: record[name] for name in IDENTITY_FIELDS}
    made.update((key, item) for key, item in value.items() if key not in made)
    reported = made.get("error")
    if reported is not None:
        error = RowError(_text(reported), stage="post_processor", kind="reported")
        made["error"] = errors.document(error)
    return made


def _text(reported: Any) -> str:
    message = reported.get("message") if isinstance(reported, dict) else reported
    return str(reported if message is None else message)


def _add_fields(record: Record, fields: Mapping[str, Any]) -> None:
    if _OWN.isdisjoint(fields):
        record.update(fields)
        return
    for name, value in fields.items():
        key = name
        if name in _OWN:
            key = f"source_{name}"
            while key in fields:
                key = f"source_{key}"
        record[key] = value


class ErrorText:
    """Error documents of rows, with the job's secrets masked wherever a message or a traceback
    quotes one."""

    def __init__(self, secrets: Collection[str]) -> None:
        self._secrets = sorted((s for s in secrets if len(s) >= 4), key=len, reverse=True)

    def document(self, error: RowError) -> dict[str, Any]:
        """``{"stage", "type", "message", "traceback"}``."""
        return {
            "stage": error.stage,
            "type": error.kind,
            "message": self.mask(error.message),
            "traceback": None if error.trace is None else self.mask(error.trace),
        }

    def mask(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, _MASK)
        return text
