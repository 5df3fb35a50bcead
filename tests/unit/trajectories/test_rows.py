"""The data set's columns: the seed's and ours, typed whatever is null, in files of bounded size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spider_sdk.errors import UsageError
from spider_worker.trajectories.filters import FILTERS, accepts
from spider_worker.trajectories.output_file import append, read_index
from spider_worker.trajectories.record import Record
from spider_worker.trajectories.rows import JSON_COLUMNS, row, schema
from spider_worker.trajectories.shards import write_shards
from tests.support.trajectories import TOOLS, conversation, record

SEED = {
    "messages", "trajectory", "instance_id", "repo", "image_name", "instruction",
    "problem_statement", "git_patch", "metrics", "resolved", "model", "agent_class",
    "max_iterations",
}  # fmt: skip
OURS = {
    "tools", "train", "messages_format", "status", "error", "attempt", "n", "dataset", "split",
    "cost", "report",
}  # fmt: skip
FORMATS = ["text", "openai"]


@pytest.mark.parametrize("messages_format", FORMATS)
def test_a_row_has_every_column(messages_format: str) -> None:
    made = row(Record(record(resolved=True)), messages_format, cost=0.75)
    assert set(made) == set(schema(messages_format).names) == SEED | OURS
    assert made["instance_id"] == "pylint__one"
    assert (made["repo"], made["image_name"]) == ("swesmith/pylint", "swebench/pylint:latest")
    assert (made["model"], made["agent_class"], made["max_iterations"]) == (
        "openai/gpt-4o", "CodeActAgent", 30,
    )  # fmt: skip
    assert (made["dataset"], made["split"]) == ("SWE-bench/SWE-smith", "train")
    assert (made["resolved"], made["cost"], made["status"]) == (True, 0.75, "finished")
    assert json.loads(made["tools"]) == TOOLS
    assert json.loads(made["trajectory"]) == [{"kind": "MessageEvent", "source": "user"}]
    assert json.loads(made["metrics"])["accumulated_cost"] == 0.25
    assert len(made["train"]) == len(made["messages"])


def test_neither_the_solution_nor_a_private_folder_is_in_a_row() -> None:
    secret = record()
    secret["instance"] |= {"test_patch": "the tests", "patch": "the answer"}
    secret["metadata"]["dataset"] = "/home/somebody/tasks.jsonl"
    secret["metadata"]["llm_config"]["model"] = "/models/private/mine"
    made = row(Record(secret), "text", cost=None)
    for text in ("the answer", "the tests", "somebody", "/models"):
        assert text not in json.dumps(made)
    assert (made["dataset"], made["model"]) == ("tasks.jsonl", "mine")


@pytest.mark.parametrize("messages_format", FORMATS)
def test_all_columns_are_typed_even_when_every_value_is_null(
    tmp_path: Path, messages_format: str
) -> None:
    empty = row(Record({"instance_id": "a"}), messages_format, cost=None)
    full = row(Record(record(resolved=False)), messages_format, cost=1.0)
    schemas = []
    for number, values in enumerate([empty, full]):
        folder = tmp_path / str(number)
        folder.mkdir()
        files, count = write_shards([values], schema(messages_format), folder)
        assert count == 1
        schemas.append(pq.read_schema(files[0]))
    assert schemas[0].equals(schemas[1])
    assert not any(pa.types.is_null(field.type) for field in schemas[0])
    nullable = [name for name in SEED | OURS if empty[name] is None]
    assert {"resolved", "cost", "error", "report", "git_patch", "model"} <= set(nullable)
    assert all(isinstance(empty[name], str) for name in JSON_COLUMNS if name != "report")


@pytest.mark.parametrize("messages_format", FORMATS)
def test_rows_come_back_from_parquet_as_they_went_in(tmp_path: Path, messages_format: str) -> None:
    malformed = record("b", messages=conversation("{"), n=1)
    malformed["report"] = {"resolved": True}
    rows = [
        row(Record(record("a", git_patch="x\ud800y\r\n")), messages_format, cost=None),
        row(Record(malformed), messages_format, cost=0.5),
    ]
    files, _ = write_shards(rows, schema(messages_format), tmp_path)
    read = pq.read_table(files[0]).to_pylist()
    assert read == rows
    assert read[0]["git_patch"] == "x?y\r\n"
    assert read[1]["resolved"] is True
    assert False in read[1]["train"]


def numbered(count: int, size: int) -> list[dict[str, Any]]:
    return [
        row(Record(record(f"i{n:03d}", git_patch="x" * size)), "text", cost=None)
        for n in range(count)
    ]


def test_files_are_cut_by_size_and_numbered(tmp_path: Path) -> None:
    rows = numbered(10, 50_000)
    files, count = write_shards(
        rows, schema("text"), tmp_path, shard_bytes=170_000, group_bytes=110_000
    )
    assert count == 10
    assert [file.name for file in files] == [f"train-{n:05d}.parquet" for n in range(4)]
    assert sorted(tmp_path.iterdir()) == files
    tables = [pq.read_table(file) for file in files]
    ids = [one for table in tables for one in table["instance_id"].to_pylist()]
    assert ids == [f"i{n:03d}" for n in range(10)]
    assert [pq.ParquetFile(file).num_row_groups for file in files] == [2, 2, 2, 1]


def test_a_row_larger_than_a_file_has_one_of_its_own(tmp_path: Path) -> None:
    files, _ = write_shards(
        numbered(3, 9000), schema("text"), tmp_path, shard_bytes=10, group_bytes=5
    )
    assert [pq.read_table(file).num_rows for file in files] == [1, 1, 1]


def test_the_same_rows_give_the_same_bytes_and_no_row_no_file(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files, _ = write_shards(iter(numbered(3, 10)), schema("text"), tmp_path / name)
        contents.append(files[0].read_bytes())
    assert contents[0] == contents[1]
    (tmp_path / "none").mkdir()
    assert write_shards([], schema("text"), tmp_path / "none") == ([], 0)
    assert not list((tmp_path / "none").iterdir())


def test_filters(tmp_path: Path) -> None:
    output = tmp_path / "output.jsonl"
    append(output, record("good", resolved=True))
    append(output, record("wrong", resolved=False))
    append(output, record("unjudged"))
    append(output, record("late", status="timeout", resolved=True))
    append(output, record("empty", status="empty_patch"))
    entries = read_index(output).latest.values()
    passed = {name: [entry.key[0] for entry in entries if accepts(name, entry)] for name in FILTERS}
    assert passed == {
        "all": ["good", "wrong", "unjudged", "late", "empty"],
        "finished": ["good", "wrong", "unjudged"],
        "resolved": ["good", "late"],
    }
    with pytest.raises(UsageError, match="not 'best'"):
        accepts("best", next(iter(entries)))
