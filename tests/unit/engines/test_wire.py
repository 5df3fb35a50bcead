"""What answers of endpoints mean."""

from __future__ import annotations

import datetime
import email.utils
from typing import Any

import orjson
import pytest

from spider_worker.engines.retry import Failure, FailureKind, RetryPolicy
from spider_worker.engines.wire import (
    EndpointError,
    error_message,
    is_quota,
    read_completion,
    retry_after_seconds,
)


def _answer(message: dict[str, Any], **more: Any) -> bytes:
    return orjson.dumps({"choices": [{"message": message, "finish_reason": "stop"}], **more})


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_completion(_answer({"content": parts})).text == "ab"


def test_a_refusal_is_the_text() -> None:
    assert read_completion(_answer({"content": None, "refusal": "no"})).text == "no"


def test_missing_usage_is_unknown_not_zero() -> None:
    usage = read_completion(_answer({"content": "a"})).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (None, None)
    usage = read_completion(_answer({"content": "a"}, usage={"prompt_tokens": 3})).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, None)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"{}", b'{"choices": []}', b'{"choices": [{"text": "a"}]}']
)
def test_no_completion_is_an_endpoint_error(body: bytes) -> None:
    with pytest.raises(EndpointError) as caught:
        read_completion(body)
    assert caught.value.status == 0


def test_an_error_wrapped_in_a_200_keeps_its_status() -> None:
    with pytest.raises(EndpointError, match="upstream is gone") as caught:
        read_completion(b'{"error": {"code": 502, "message": "upstream is gone"}}')
    assert caught.value.status == 502


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "too long"}}', "too long"),
        (b'{"error": "bad"}', "bad"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b"<html>\n  Bad Gateway</html>", "<html> Bad Gateway</html>"),
        (b"", "(empty answer)"),
    ],
)
def test_error_messages_are_found(body: bytes, said: str) -> None:
    assert error_message(body) == said


def test_quota_is_told_from_throttling() -> None:
    assert is_quota(b'{"error": {"code": "insufficient_quota"}}')
    assert not is_quota(b'{"error": {"code": "rate_limit_exceeded"}}')


def test_retry_after_reads_seconds_and_dates() -> None:
    assert retry_after_seconds("2") == 2
    assert retry_after_seconds("0.5") == 0.5
    assert retry_after_seconds("-3") == 0
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=60)
    seconds = retry_after_seconds(email.utils.format_datetime(later, usegmt=True))
    assert seconds is not None
    assert 50 < seconds <= 61
    assert retry_after_seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    for unreadable in (None, "", "soon"):
        assert retry_after_seconds(unreadable) is None


def test_delays_grow_and_are_bounded() -> None:
    policy = RetryPolicy()
    error = Failure(FailureKind.ERROR, "http_500", "")
    delays = [policy.delay(error, n) for n in range(1, 9)]
    assert 0.05 <= delays[0] <= 0.1
    assert delays[2] > delays[0]
    assert max(delays) <= 30


def test_retry_after_is_never_undercut_nor_longer_than_patience() -> None:
    policy = RetryPolicy(patience=60)
    assert policy.delay(Failure(FailureKind.THROTTLED, "http_429", "", 5.0), 1) >= 5
    assert policy.delay(Failure(FailureKind.THROTTLED, "http_429", "", 86400.0), 1) < 61
