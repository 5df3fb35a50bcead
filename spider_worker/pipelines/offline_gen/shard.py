"""The shard of a unit: its records in order, cut out of the journal."""

from __future__ import annotations

__all__ = ["write_shard"]

import os
from collections.abc import Iterator
from pathlib import Path

from spider_worker.pipelines.offline_gen.journal import Journal
from spider_worker.pipelines.offline_gen.ledger import Ledger, State

_BUFFER = 1 << 20


_FINISHED = (State.OK, State.ERROR)
_KNOWN = (*_FINISHED, State.PENDING, State.DROPPED)


def write_shard(journal: Journal, ledger: Ledger, path: Path, *, complete: bool) -> None:
    """Write the finished records (error rows included, dropped ones not) to ``path``, sorted by
    index and sample, and make them durable. Memory does not depend on their number: the journal
    is mapped, and rows that follow each other in it are copied as one run.

    An incomplete shard is all that a later attempt will see of this one: it also carries the
    journal's lines of dropped rows and of completions that wait for post-processing (readers
    of records pass over them). Raises OSError.
    """
    states = _FINISHED if complete else _KNOWN
    with path.open("wb", buffering=_BUFFER) as file:
        if any(ledger.count(state) for state in states):
            with journal.map() as source, memoryview(source) as view:
                for start, stop in _runs(ledger, states):
                    with view[start:stop] as run:
                        file.write(run)
        file.flush()
        os.fsync(file.fileno())


def _runs(ledger: Ledger, states: tuple[State, ...]) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of stretches of the journal that go to the shard as they are."""
    start = stop = 0
    for slot in ledger.slots(*states):
        offset, length = ledger.place(slot)
        if offset != stop:
            if stop > start:
                yield start, stop
            start = offset
        stop = offset + length
    if stop > start:
        yield start, stop
