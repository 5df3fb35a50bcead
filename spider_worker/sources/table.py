"""A data set on disk: rows by position, mapped from Arrow files."""

from __future__ import annotations

__all__ = ["DatasetsSource"]

import threading
from collections.abc import Iterator
from typing import Any

from spider_worker.sources.base import IndexedRow
from spider_worker.sources.convert import table_rows
from spider_worker.sources.loading import DatasetSpec, hub_errors, load


class DatasetsSource:
    """Rows of a data set that the ``datasets`` library holds in its cache on disk.

    The split slice comes first, then the shuffle (``shuffle_seed`` None: none), then
    ``max_examples``. Nothing is loaded before the first call of a method. Memory is that
    of one batch: the files are mapped, and so are the positions of a shuffle.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        *,
        split: str = "train",
        shuffle_seed: int | None = None,
        max_examples: int | None = None,
    ) -> None:
        self._spec = spec
        self._split = split
        self._shuffle_seed = shuffle_seed
        self._max_examples = max_examples
        self._loaded: Any = None
        self._lock = threading.Lock()

    def count(self) -> int:
        rows = len(self._dataset())
        return rows if self._max_examples is None else min(rows, self._max_examples)

    def columns(self) -> list[str]:
        return list(self._dataset().column_names)

    def batches(self, start: int, stop: int | None, size: int = 256) -> Iterator[list[IndexedRow]]:
        dataset, end = self._dataset(), self.count()
        stop = end if stop is None else min(stop, end)
        for first in range(start, stop, size):
            with hub_errors(self._spec):
                rows = table_rows(dataset[first : min(first + size, stop)])
            yield list(enumerate(rows, first))

    def close(self) -> None:
        with self._lock:
            self._loaded = None

    def _dataset(self) -> Any:
        with self._lock:
            if self._loaded is None:
                dataset = load(self._spec, split=self._split, streaming=False)
                if self._shuffle_seed is not None:
                    with hub_errors(self._spec):
                        dataset = dataset.shuffle(seed=self._shuffle_seed)
                self._loaded = dataset
            return self._loaded
