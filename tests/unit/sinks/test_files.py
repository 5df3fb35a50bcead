"""JSON Lines and JSON arrays, and that a file is whole or not there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spider_worker.sinks.atomic import atomic_path
from spider_worker.sinks.jsonl import dump_record, write_json, write_jsonl
from spider_worker.sinks.parquet import write_parquet

RECORDS = [{"id": "0-0", "text": "ä\n\u2028"}, {"id": "1-0", "n": 2**80, "bad": "\ud800"}]


def test_lines_and_arrays_read_back(tmp_path: Path) -> None:
    assert write_jsonl(iter(RECORDS), tmp_path / "r.jsonl") == 2
    lines = (tmp_path / "r.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == RECORDS
    assert lines[-1] == b""
    assert write_json(iter(RECORDS), tmp_path / "r.json") == 2
    assert json.loads((tmp_path / "r.json").read_bytes()) == RECORDS
    assert write_json([], tmp_path / "empty.json") == 0
    assert json.loads((tmp_path / "empty.json").read_bytes()) == []


def test_what_no_json_can_hold_is_an_error() -> None:
    with pytest.raises(TypeError):
        dump_record({"a": object()})


def test_what_is_not_finite_is_null_whichever_way_it_is_written() -> None:
    assert dump_record([math.inf, 1]) == b"[null,1]"
    assert json.loads(dump_record({"a": [math.nan], "b": 2**70})) == {"a": [None], "b": 2**70}


def broken() -> Iterator[dict[str, Any]]:
    yield {"a": 1}
    raise RuntimeError("the source broke")


class Broken:
    """Fails in the second pass only, when the file is being written."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.passes += 1
        return iter([{"a": 1}]) if self.passes == 1 else broken()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_jsonl(broken(), path),
        lambda path: write_json(broken(), path),
        lambda path: write_parquet(Broken(), path),
    ],
)
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "data"
    path.write_text("before")
    with pytest.raises(RuntimeError, match="broke"):
        write(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_wrote_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []
