"""Records as Parquet, in two passes (find the schema, write) and flat memory."""

from __future__ import annotations

__all__ = ["infer_schema", "write_parquet"]

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from spider_sdk.records import Record
from spider_worker.sinks.atomic import atomic_path
from spider_worker.sinks.schema import TableSchema

_BATCH: Final = 512  #: rows converted at a time
ROW_GROUP_ROWS: Final = 20_000
ROW_GROUP_BYTES: Final = 16 * 2**20  #: of Arrow data, whichever comes first


def infer_schema(records: Iterable[Record], schema: TableSchema | None = None) -> TableSchema:
    """``schema`` (or an empty one), widened by every record."""
    schema = TableSchema() if schema is None else schema
    for record in records:
        schema.add(record)
    return schema


def write_parquet(records: Iterable[Record], path: Path, schema: TableSchema | None = None) -> int:
    """Write ``records`` in the order given; returns their number. Atomic.

    Without ``schema`` the records are gone through twice, so they must be something that
    can be (a list, a ShardSource), not an iterator: TypeError otherwise. The same records
    and schema give the same bytes. Without a record the file has the schema's columns, which
    may be none.
    """
    if schema is None:
        if iter(records) is records:
            raise TypeError("write_parquet goes through the records twice: an iterator won't do")
        schema = infer_schema(records)
    count = 0
    encode = schema.encoder()
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, schema.arrow(), compression="zstd") as writer,
    ):
        group: list[pa.RecordBatch] = []
        for rows in _batched(records):
            group.append(encode(rows))
            count += len(rows)
            size = sum(batch.nbytes for batch in group)
            if size >= ROW_GROUP_BYTES or len(group) * _BATCH >= ROW_GROUP_ROWS:
                _write_group(writer, group)
        if group:
            _write_group(writer, group)
    return count


def _write_group(writer: pq.ParquetWriter, group: list[pa.RecordBatch]) -> None:
    table = pa.Table.from_batches(group)
    writer.write_table(table, row_group_size=table.num_rows)
    group.clear()


def _batched(records: Iterable[Record]) -> Iterator[list[Record]]:
    rows = iter(records)
    while batch := list(itertools.islice(rows, _BATCH)):
        yield batch
