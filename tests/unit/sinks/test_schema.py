"""Kinds widen, never narrow, and every record that widened them can be written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from spider_worker.sinks import schema as schema_module
from spider_worker.sinks.parquet import infer_schema, write_parquet
from spider_worker.sinks.schema import TableSchema, merge, observe


def kind_of(*values: Any) -> Any:
    kind: Any = "null"
    for value in values:
        kind = observe(kind, value)
    return kind


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([None], "null"),
        ([None, 1], "int"),
        ([1, 2.5], "float"),
        ([2.5, 1], "float"),
        ([True, 1], "json"),
        (["a", 1], "json"),
        ([2**63], "json"),
        ([{"a": 1}, {"b": "x"}], {"struct": {"a": "int", "b": "string"}}),
        ([{"a": 1}, [1]], "json"),
        ([[], [1], [None, 2.5]], {"list": "float"}),
        ([{}], {"struct": {}}),
        ([{f"user-{n}": n} for n in range(65)], "json"),
    ],
)
def test_the_narrowest_kind_that_holds_all_values(values: list[Any], kind: Any) -> None:
    assert kind_of(*values) == kind


def test_nesting_beyond_the_limit_is_json_text() -> None:
    value: Any = 1
    for _ in range(schema_module.MAX_DEPTH + 2):
        value = {"a": value}
    kind = kind_of(value)
    for _ in range(schema_module.MAX_DEPTH):
        kind = kind["struct"]["a"]
    assert kind == "json"


def test_what_json_does_not_know_is_refused() -> None:
    with pytest.raises(TypeError, match="bytes"):
        TableSchema().add({"a": b"x"})


def test_own_fields_have_their_types_before_any_value_was_seen() -> None:
    record = {"id": "0-0", "reasoning_content": None, "usage": None, "messages": []}
    assert infer_schema([record]).arrow() == pa.schema(
        {
            "id": pa.string(),
            "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
            "reasoning_content": pa.string(),
            "usage": pa.struct({"prompt_tokens": pa.int64(), "completion_tokens": pa.int64()}),
        }
    )


def test_a_post_processors_own_use_of_a_field_wins_over_its_usual_type() -> None:
    assert infer_schema([{"completion": {"score": 1}}]).arrow().field("completion").type == (
        pa.struct({"score": pa.int64()})
    )


def test_columns_keep_their_order_and_errors_can_be_left_out() -> None:
    schema = TableSchema(exclude=["error"])
    schema.add({"z": 1, "completion": "x", "error": None, "id": "0-0"})
    schema.add({"a": 1})
    assert schema.arrow().names == ["id", "completion", "z", "a"]


def test_kinds_survive_json_and_go_on_widening() -> None:
    schema = infer_schema([{"a": 1, "b": {"x": None}}])
    again = TableSchema(json.loads(json.dumps(schema.kinds)))
    assert again.arrow() == schema.arrow()
    again.add({"a": 0.5, "b": {"y": "t"}})
    assert again.kinds == {"a": "float", "b": {"struct": {"x": "null", "y": "string"}}}
    assert schema.kinds["b"] == {"struct": {"x": "null"}}


def test_messages_with_tool_calls_and_parts(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    records = [
        {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
    ]
    write_parquet(records, tmp_path / "t.parquet")
    first, second, third = pq.read_table(tmp_path / "t.parquet").to_pylist()
    # Content that is text in one row and a list in another is JSON text in all.
    assert first["messages"][0] == {"role": "user", "content": '"hi"', "tool_calls": None}
    assert second["messages"][0]["tool_calls"] == [call]
    assert json.loads(third["messages"][0]["content"]) == [{"type": "text", "text": "x"}]


def test_lone_surrogates_and_huge_numbers_do_not_stop_a_table(tmp_path: Path) -> None:
    records = [{"a": "\ud800x", "b": 2**60 + 1}, {"a": "y", "b": 0.5}, {"a": None, "b": 10**400}]
    write_parquet(records[:2], tmp_path / "t.parquet")
    rows = pq.read_table(tmp_path / "t.parquet").to_pylist()
    assert rows == [{"a": "\ufffdx", "b": float(2**60)}, {"a": "y", "b": 0.5}]
    write_parquet(records, tmp_path / "t.parquet")
    assert pq.read_table(tmp_path / "t.parquet").to_pylist()[2]["b"] == str(10**400)


def test_one_pass_over_an_iterator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="twice"):
        write_parquet(iter([{"a": 1}]), tmp_path / "t.parquet")


def test_row_groups_bound_memory_and_keep_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spider_worker.sinks.parquet.ROW_GROUP_ROWS", 1024)
    records = [{"n": n} for n in range(3000)]
    assert write_parquet(records, tmp_path / "t.parquet") == 3000
    file = pq.ParquetFile(tmp_path / "t.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(3)] == [1024, 1024, 952]
    assert file.read().to_pylist() == records


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3)
    ),
    max_leaves=8,
)
rows = st.lists(st.dictionaries(st.sampled_from(["x", "y", "id"]), values), max_size=6)


@example(rows=[{"x": {"a": math.inf, "b": 2**70}}, {"x": 1}])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=rows)
def test_whatever_was_seen_can_be_encoded(rows: list[dict[str, Any]]) -> None:
    schema = infer_schema(rows)
    batch = schema.encoder()(rows)
    assert batch.num_rows == len(rows) or not rows or not schema.kinds


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(first=values, second=values)
def test_merging_kinds_is_seeing_both_values(first: Any, second: Any) -> None:
    # Nesting and number of keys stay under the limits here.
    assert merge(kind_of(first), kind_of(second)) == kind_of(first, second)
