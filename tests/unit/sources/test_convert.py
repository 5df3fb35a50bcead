"""What Arrow values become in a row."""

import datetime
import decimal
import json
from typing import Any

import pyarrow as pa
import pytest

from spider_worker.sources.convert import table_rows

UTC = datetime.UTC
NAN = float("nan")


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([1, None]), [1, None]),
        (pa.array(["a", None]), ["a", None]),
        (pa.array([1.5, NAN, float("-inf"), None]), [1.5, None, None, None]),
        (pa.array([[1.0, NAN], None]), [[1.0, None], None]),
        (pa.array([{"a": NAN, "b": 1}]), [{"a": None, "b": 1}]),
        (pa.array([b"\xff", None]), ["/w==", None]),
        (pa.array([{"bytes": b"ab", "path": "x.png"}]), [{"bytes": "YWI=", "path": "x.png"}]),
        (pa.array([datetime.date(2024, 1, 2)]), ["2024-01-02"]),
        (pa.array([datetime.datetime(2024, 1, 2, 3, tzinfo=UTC)]), ["2024-01-02T03:00:00+00:00"]),
        (pa.array([1], pa.timestamp("ns")), ["1970-01-01T00:00:00.000000001"]),
        (pa.array([datetime.time(1, 2)]), ["01:02:00"]),
        (pa.array([datetime.timedelta(seconds=1.5)]), [1.5]),
        (pa.array([decimal.Decimal("1.10")]), ["1.10"]),
        (pa.array([[("k", b"a"), ("l", None)]], pa.map_(pa.string(), pa.binary())),
         [{"k": "YQ==", "l": None}]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array(['{"a": [1]}', None], pa.json_()), [{"a": [1]}, None]),
        (pa.ListArray.from_arrays([0, 1], pa.array(['{"a": 1}'], pa.json_())), [[{"a": 1}]]),
    ],
)  # fmt: skip
def test_values(array: pa.Array, expected: list[Any]) -> None:
    rows = table_rows(pa.table({"v": array}))
    assert rows == [{"v": value} for value in expected]
    json.dumps(rows, allow_nan=False)


def test_arrays_of_the_datasets_library_become_lists() -> None:
    from datasets import Array2D, Dataset, Features

    features = Features({"a": Array2D(shape=(2, 2), dtype="int32")})
    dataset = Dataset.from_dict({"a": [[[1, 2], [3, 4]]]}, features=features)
    assert table_rows(dataset.with_format("arrow")[0:1]) == [{"a": [[1, 2], [3, 4]]}]


def test_a_table_without_columns_keeps_its_rows() -> None:
    assert table_rows(pa.table({"a": [1, 2]}).select([])) == [{}, {}]
