"""The words of ``/chat/completions``: a request's body and what an answer means."""

from __future__ import annotations

__all__ = ["EndpointError", "error_message", "is_quota", "read_completion", "retry_after_seconds"]

import datetime
import email.utils
from collections.abc import Mapping
from typing import Any

import orjson

from spider_worker.engines.base import Completion, Usage

_NO_USAGE = Usage(None, None)


class EndpointError(Exception):
    """The endpoint answered 200 and yet no completion. ``status`` is the HTTP status that it
    meant, where the body says (some gateways wrap an upstream's error in a 200), else 0."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


def read_completion(body: bytes) -> Completion:
    """The first choice of an answer. Raises EndpointError if there is none."""
    try:
        answer = orjson.loads(body)
        choices = answer.get("choices") if isinstance(answer, dict) else None
    except orjson.JSONDecodeError as error:
        raise EndpointError(f"malformed JSON: {error}") from error
    if not choices:
        failure = answer.get("error") if isinstance(answer, dict) else None
        code = failure.get("code") if isinstance(failure, dict) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else 0
        raise EndpointError(error_message(body) if failure else "no choices in the answer", status)
    try:
        return _choice(choices[0], answer.get("usage"))
    except (AttributeError, KeyError, TypeError) as error:
        raise EndpointError(f"an answer of unknown shape: {body[:200]!r}") from error


def _choice(choice: Mapping[str, Any], usage: Mapping[str, Any] | None) -> Completion:
    message = choice["message"]
    content = message.get("content")
    if content is None:
        content = message.get("refusal") or ""
    elif not isinstance(content, str):  # a list of parts
        content = "".join(part.get("text") or "" for part in content)
    reasoning = (
        message.get("reasoning_content") or message.get("reasoning") or message.get("thinking")
    )
    return Completion(
        text=content,
        finish_reason=choice.get("finish_reason"),
        usage=(
            Usage(usage.get("prompt_tokens"), usage.get("completion_tokens"))
            if usage
            else _NO_USAGE
        ),
        reasoning=reasoning if isinstance(reasoning, str) else None,
        tool_calls=message.get("tool_calls") or None,
    )


def error_message(body: bytes) -> str:
    """What an error body says, in one line of at most 500 characters."""
    text = body[:2000].decode("utf-8", "replace").strip()
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = None
    if isinstance(document, dict):
        error = document.get("error") or document.get("message") or document.get("detail")
        if isinstance(error, dict):
            error = error.get("message") or error
        if error:
            text = str(error)
    return " ".join(text.split())[:500] or "(empty answer)"


def is_quota(body: bytes) -> bool:
    """Whether a 429 means "no money left", which waiting does not mend."""
    return b"insufficient_quota" in body or b"billing_hard_limit" in body


def retry_after_seconds(value: str | None) -> float | None:
    """``Retry-After`` (seconds, or an HTTP date) as seconds from now; None if absent or
    unreadable."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.UTC)
    return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())
