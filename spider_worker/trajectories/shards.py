"""Rows as numbered Parquet files.

A trajectory can be megabytes long, so files and row groups are bounded by bytes and not by rows:
a batch of many would not fit into Arrow's 32-bit offsets, nor a row group into a reader's memory.
"""

from __future__ import annotations

__all__ = ["GROUP_BYTES", "SHARD_BYTES", "write_shards"]

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

GROUP_BYTES: Final = 32 * 2**20  #: of Arrow data in a row group
SHARD_BYTES: Final = 512 * 2**20  #: of Arrow data in a file, before compression


def write_shards(
    rows: Iterable[Mapping[str, Any]],
    schema: pa.Schema,
    folder: Path,
    *,
    split: str = "train",
    shard_bytes: int = SHARD_BYTES,
    group_bytes: int = GROUP_BYTES,
) -> tuple[list[Path], int]:
    """Write ``<split>-00000.parquet`` and so on into ``folder``. Returns the files and the number
    of rows; without a row there is no file. The same rows give the same bytes."""
    files: list[Path] = []
    count = 0
    with contextlib.ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        group: list[pa.RecordBatch] = []
        held = written = 0

        def flush() -> None:
            nonlocal held, written
            if writer is not None and group:
                table = pa.Table.from_batches(group)
                writer.write_table(table, row_group_size=table.num_rows)
                written += held
                held = 0
                group.clear()

        for row in rows:
            batch = pa.RecordBatch.from_pylist([row], schema=schema)
            if held + batch.nbytes > group_bytes:
                flush()
            if writer is None or (held + written and held + written + batch.nbytes > shard_bytes):
                flush()
                stack.close()
                files.append(folder / f"{split}-{len(files):05d}.parquet")
                writer = stack.enter_context(
                    pq.ParquetWriter(files[-1], schema, compression="zstd")
                )
                written = 0
            group.append(batch)
            held += batch.nbytes
            count += 1
        flush()
    return files, count
