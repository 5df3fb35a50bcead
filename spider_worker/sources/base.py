"""What a source is: rows by position, streamed, memory independent of their number."""

from __future__ import annotations

__all__ = ["IndexedRow", "Row", "Source"]

from collections.abc import Iterator
from typing import Any, Protocol

Row = dict[str, Any]
IndexedRow = tuple[int, Row]
"""``(index, row)``: ``index`` is the row's 0-based position in the selected source (after
split slice, shuffle and max_examples), the same on every worker and every attempt. The row
is JSON-serialisable (dates as ISO strings, bytes as base64, arrays as lists)."""


class Source(Protocol):
    """Blocking; pipelines call it from a thread."""

    def count(self) -> int | None:
        """Number of rows, None where only reading to the end can tell (streaming)."""

    def columns(self) -> list[str] | None:
        """Column names where they are known before the first row, else None."""

    def batches(self, start: int, stop: int | None, size: int = 256) -> Iterator[list[IndexedRow]]:
        """Rows ``start`` to ``stop`` (exclusive; None: the end) in lists of up to ``size``.

        Ends early, without an error, where the source ends. Raises FatalJobError when
        the data cannot be read at all.
        """

    def close(self) -> None: ...
