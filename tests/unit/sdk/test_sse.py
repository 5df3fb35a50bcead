from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spider_sdk import sse
from spider_sdk.errors import ApiError
from spider_sdk.sse import Message, read_messages

STREAM = 'id: 0-1\ndata: {"a": "é"}\n\n: beat\n\nevent: end\r\ndata: x\r\ndata: y\r\n\r\ndata: torn'
EXPECTED = [
    Message("message", '{"a": "é"}', "0-1"),
    None,
    Message("end", "x\ny", "0-1"),
]


def test_messages_comments_and_a_torn_end() -> None:
    assert list(read_messages([STREAM.encode()])) == EXPECTED


@given(st.lists(st.integers(0, len(STREAM.encode())), max_size=12))
def test_where_chunks_are_cut_makes_no_difference(cuts: list[int]) -> None:
    raw = STREAM.encode()
    edges = [0, *sorted(cuts), len(raw)]
    chunks = [raw[a:b] for a, b in itertools.pairwise(edges)]
    assert list(read_messages(chunks)) == EXPECTED


def test_endless_lines_and_messages_end_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_MESSAGE_CHARS", 100)
    with pytest.raises(ApiError):
        list(read_messages([b"data: " + b"x" * 60, b"x" * 60]))
    with pytest.raises(ApiError):
        list(read_messages([b"data: 123456789012345\n"] * 60))
