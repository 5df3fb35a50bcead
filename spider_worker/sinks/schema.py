"""One Arrow schema for records that were never promised one.

Source columns and what post-processors return may differ from row to row. ``TableSchema``
looks at every record and keeps, for each column, the narrowest *kind* that holds all values
seen so far. Kinds only ever widen:

    null → anything · int → float · {struct} gains fields · [list] widens its items
    everything else that disagrees (text beside numbers, a list beside a struct …) → json

``json`` is a column of JSON text, so nothing is lost where types are mixed. A dict with many
different keys (a mapping rather than a struct), too deep a nesting and integers beyond 64 bits
are ``json`` as well. A kind is itself JSON: a name, ``{"list": kind}`` or
``{"struct": {field: kind}}``.
"""

from __future__ import annotations

__all__ = ["Kind", "TableSchema", "merge", "observe"]

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa

from spider_sdk.records import RECORD_FIELDS, Record
from spider_worker.sinks.jsonl import dump_record

Kind = str | dict[str, Any]

MAX_FIELDS: Final = 64  #: a dict with more different keys is a mapping, not a struct
MAX_DEPTH: Final = 8

_INT64 = range(-(2**63), 2**63)
_ARROW: Final = {
    "null": pa.null(),
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "string": pa.string(),
    "json": pa.string(),
}
_USAGE: Final = {"struct": {"prompt_tokens": "int", "completion_tokens": "int"}}
_MESSAGES: Final = {"list": {"struct": {"role": "string", "content": "string"}}}
_ERROR_FIELDS: Final = ("stage", "type", "message", "traceback")

#: The kinds of a record's own fields while all their values are None. They differ from
#: what is seen only where a post-processor put something else under the same name.
_HINTS: Final[Mapping[str, Kind]] = {
    "id": "string",
    "index": "int",
    "sample": "int",
    "prompt": "string",
    "messages": _MESSAGES,
    "completion": "string",
    "reasoning_content": "string",
    "finish_reason": "string",
    "usage": _USAGE,
    "error": {"struct": dict.fromkeys(_ERROR_FIELDS, "string")},
}


def observe(kind: Kind, value: Any, depth: int = 0) -> Kind:
    """``kind``, widened to hold ``value`` (the same object where it already does).

    Raises TypeError for a value that JSON does not know.
    """
    if value is None:
        return kind
    if isinstance(value, str):
        return _scalar(kind, "string")
    if isinstance(value, bool):
        return _scalar(kind, "bool")
    if isinstance(value, int):
        return _scalar(kind, "int" if value in _INT64 else "json")
    if isinstance(value, float):
        return _scalar(kind, "float")
    if kind == "json" or depth >= MAX_DEPTH:
        return "json"
    if isinstance(value, dict):
        return _struct(kind, value, depth)
    if isinstance(value, list | tuple):
        return _list(kind, value, depth)
    raise TypeError(f"a record holds a {type(value).__name__}, which JSON does not know")


def _scalar(kind: Kind, seen: str) -> Kind:
    return kind if kind == seen else merge(kind, seen)


def _struct(kind: Kind, value: Mapping[str, Any], depth: int) -> Kind:
    if kind == "null":
        kind = {"struct": {}}
    if not isinstance(kind, dict) or "struct" not in kind:
        return "json"
    fields: dict[str, Kind] = kind["struct"]
    changed: dict[str, Kind] | None = None
    for name, item in value.items():
        before = fields.get(name)
        after = observe("null" if before is None else before, item, depth + 1)
        if before is None or after is not before:
            changed = dict(fields) if changed is None else changed
            changed[str(name)] = after
    if changed is None:
        return kind
    return {"struct": changed} if len(changed) <= MAX_FIELDS else "json"


def _list(kind: Kind, value: Sequence[Any], depth: int) -> Kind:
    if kind == "null":
        kind = {"list": "null"}
    if not isinstance(kind, dict) or "list" not in kind:
        return "json"
    items: Kind = kind["list"]
    for item in value:
        items = observe(items, item, depth + 1)
    return kind if items is kind["list"] else {"list": items}


def merge(first: Kind, second: Kind) -> Kind:
    """The narrowest kind that holds the values of both; fields of ``first`` come first."""
    if first == second or second == "null":
        return first
    if first == "null":
        return second
    if {"int", "float"} == {k for k in (first, second) if isinstance(k, str)}:
        return "float"
    if isinstance(first, dict) and isinstance(second, dict):
        if "list" in first and "list" in second:
            return {"list": merge(first["list"], second["list"])}
        if "struct" in first and "struct" in second:
            fields = dict(first["struct"])
            for name, kind in second["struct"].items():
                fields[name] = merge(fields[name], kind) if name in fields else kind
            return {"struct": fields} if len(fields) <= MAX_FIELDS else "json"
    return "json"


def _settle(kind: Kind, hint: Kind | None) -> Kind:
    """``kind`` with the hint where nothing but None was seen, and no struct left empty
    (Parquet has no struct without fields, so an always empty dict is JSON text)."""
    if kind == "null":
        return hint or "null"
    if not isinstance(kind, dict):
        return kind
    known = hint if isinstance(hint, dict) else {}
    if "list" in kind:
        return {"list": _settle(kind["list"], known.get("list"))}
    hints = known.get("struct", {})
    fields = {name: _settle(field, hints.get(name)) for name, field in kind["struct"].items()}
    return {"struct": fields} if fields else "json"


def _arrow(kind: Kind) -> pa.DataType:
    if isinstance(kind, str):
        return _ARROW[kind]
    if "list" in kind:
        return pa.list_(_arrow(kind["list"]))
    return pa.struct([pa.field(name, _arrow(field)) for name, field in kind["struct"].items()])


def _encoder(kind: Kind) -> Callable[[Any], Any] | None:
    """What turns a value of that kind into one that pyarrow takes; None: nothing need be done."""
    if kind == "json":
        return lambda value: None if value is None else dump_record(value).decode()
    if kind == "float":
        return _as_float
    if isinstance(kind, str):
        return None
    if "list" in kind:
        items = _encoder(kind["list"])
        if items is None:
            return None
        return lambda value: None if value is None else [items(item) for item in value]
    fields = {name: _encoder(field) for name, field in kind["struct"].items()}
    encoders = [(name, encode) for name, encode in fields.items() if encode is not None]
    if not encoders:
        return None

    def encode_struct(value: Any) -> Any:
        if value is None:
            return None
        return {**value, **{name: encode(value.get(name)) for name, encode in encoders}}

    return encode_struct


def _as_float(value: Any) -> float | None:
    """pyarrow refuses integers that a double does not hold exactly; a column of mixed
    numbers is rounded instead, as every reader of JSON does."""
    try:
        return None if value is None else float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _clean_text(value: Any) -> Any:
    """``value`` with lone surrogates (which UTF-8 cannot hold) replaced by U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_clean_text(name): _clean_text(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean_text(item) for item in value]
    return value


class TableSchema:
    """The columns of a table, widened by ``add``. ``exclude`` names columns to leave out."""

    def __init__(
        self, kinds: Mapping[str, Kind] | None = None, *, exclude: Iterable[str] = ()
    ) -> None:
        self._kinds: dict[str, Kind] = dict(kinds or {})
        self._exclude = frozenset(exclude)

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """What was seen, by column: JSON, to be given to a later ``TableSchema``."""
        return self._kinds

    def add(self, record: Record) -> None:
        """Widen the schema to hold ``record``."""
        for name, value in record.items():
            if name in self._exclude:
                continue
            before = self._kinds.get(name)
            after = observe("null" if before is None else before, value)
            if after is not before:
                self._kinds[name] = after

    def _settled(self) -> dict[str, Kind]:
        own = [name for name in RECORD_FIELDS if name in self._kinds]
        rest = [name for name in self._kinds if name not in _HINTS]
        return {name: _settle(self._kinds[name], _HINTS.get(name)) for name in (*own, *rest)}

    def arrow(self) -> pa.Schema:
        """The record's own fields first, then other columns as they were first seen."""
        return pa.schema([pa.field(name, _arrow(kind)) for name, kind in self._settled().items()])

    def json_columns(self) -> list[str]:
        """Columns that hold JSON text because their values share no type."""
        return [name for name, kind in self._settled().items() if kind == "json"]

    def encoder(self) -> Callable[[Sequence[Record]], pa.RecordBatch]:
        """What makes a record batch of records that were all given to ``add``."""
        schema = self.arrow()
        columns = [
            (name, field.type, _encoder(kind))
            for (name, kind), field in zip(self._settled().items(), schema, strict=True)
        ]

        def encode(records: Sequence[Record]) -> pa.RecordBatch:
            arrays = []
            for name, kind, prepare in columns:
                values = [record.get(name) for record in records]
                if prepare is not None:
                    values = [prepare(value) for value in values]
                try:
                    arrays.append(pa.array(values, type=kind))
                except UnicodeEncodeError:
                    arrays.append(pa.array([_clean_text(value) for value in values], type=kind))
            return pa.RecordBatch.from_arrays(arrays, schema=schema)

        return encode
