"""Arrow tables to rows of JSON values, column by column.

===========================  ============================================================
dates, times, timestamps     ISO 8601 text
durations                    seconds, as a number
decimals                     text, so that no digit is lost
bytes                        base64 text
NaN and infinities           None (JSON has neither)
maps                         objects, their keys as text
images, audio, video         ``{"path", "bytes"}`` as stored, never decoded
arrays (Array2D …)           nested lists
JSON columns                 what they hold
===========================  ============================================================

Other values are JSON already and are not touched one by one.
"""

from __future__ import annotations

__all__ = ["table_rows"]

import base64
import functools
import json
import math
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from spider_worker.sources.base import Row

Convert = Callable[[Any], Any]


def table_rows(table: pa.Table) -> list[Row]:
    """The rows of a table, in order."""
    names = table.column_names
    if not names:
        return [{} for _ in range(table.num_rows)]
    columns = [_column(table.column(position)) for position in range(len(names))]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _column(column: pa.ChunkedArray) -> list[Any]:
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType) and not isinstance(kind, pa.JsonType):
        chunks = [chunk.storage for chunk in column.chunks]
        column = pa.chunked_array(chunks, type=kind.storage_type)
        kind = kind.storage_type
    floats = not all(_finite(chunk) for chunk in column.chunks)
    convert = _converter(kind, floats)
    values: list[Any] = column.to_pylist()
    return values if convert is None else [None if v is None else convert(v) for v in values]


def _finite(array: pa.Array) -> bool:
    """True where no float in an array is NaN or infinite; cheap, unlike a look at each value."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _finite(array.storage)
    if pa.types.is_floating(kind):
        return pc.all(pc.is_finite(array)).as_py() is not False
    if _is_list(kind):
        return _finite(array.flatten())
    if pa.types.is_struct(kind):
        return all(_finite(child) for child in array.flatten())
    return not pa.types.is_map(kind) or _finite(array.items)


@functools.lru_cache(maxsize=512)
def _converter(kind: pa.DataType, floats: bool) -> Convert | None:
    """What to do to values of a type, None for nothing. ``floats``: some are not finite."""
    if isinstance(kind, pa.JsonType):
        return json.loads
    if isinstance(kind, pa.BaseExtensionType):
        return _nested_extension(_converter(kind.storage_type, floats))
    if _is_list(kind):
        item = _converter(kind.value_type, floats)
        return None if item is None else functools.partial(_each, item)
    if pa.types.is_struct(kind):
        fields = [kind.field(position) for position in range(kind.num_fields)]
        items = {field.name: _converter(field.type, floats) for field in fields}
        needed = {name: item for name, item in items.items() if item is not None}
        return functools.partial(_fields, needed) if needed else None
    if pa.types.is_map(kind):
        return functools.partial(_map, _converter(kind.item_type, floats))
    if pa.types.is_dictionary(kind):
        return _converter(kind.value_type, floats)
    return _leaf(kind, floats)


def _leaf(kind: pa.DataType, floats: bool) -> Convert | None:
    types = pa.types
    if types.is_floating(kind):
        return _finite_or_none if floats else None
    if types.is_timestamp(kind) or types.is_date(kind) or types.is_time(kind):
        return _iso
    if types.is_duration(kind):
        return _seconds
    if types.is_decimal(kind):
        return str
    if (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    ):
        return _base64
    return None


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def _each(convert: Convert, values: list[Any]) -> list[Any]:
    return [None if value is None else convert(value) for value in values]


def _fields(converters: dict[str, Convert], value: dict[str, Any]) -> dict[str, Any]:
    for name, convert in converters.items():
        if value[name] is not None:
            value[name] = convert(value[name])
    return value


def _map(convert: Convert | None, pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    if convert is None:
        return {str(key): value for key, value in pairs}
    return {str(key): None if value is None else convert(value) for key, value in pairs}


def _nested_extension(convert: Convert | None) -> Convert:
    def unpack(value: Any) -> Any:
        plain = value.tolist() if hasattr(value, "tolist") else value
        return plain if convert is None or plain is None else convert(plain)

    return unpack


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _iso(value: Any) -> str:
    text: str = value.isoformat()
    return text


def _seconds(value: Any) -> float:
    seconds: float = value.total_seconds()
    return seconds


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")
