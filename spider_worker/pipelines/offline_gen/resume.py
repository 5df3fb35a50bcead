"""What a new attempt takes over from the ones before it.

Files come oldest first. A journal that got as far as its ``ready`` line holds everything that was
worth keeping of what came before it, so it replaces that; one that did not is a copy that was cut
off, and is passed over. A shard is what a unit was committed with: where it is the last file,
somebody asked for this unit again, and error rows are run again. After a journal alone (an
attempt that broke) error rows stay: nobody has asked for them twice.
"""

from __future__ import annotations

__all__ = ["Takeover", "take_over"]

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spider_worker.pipelines.base import ShardFile
from spider_worker.pipelines.offline_gen.journal import (
    Journal,
    Line,
    LineKind,
    Spent,
    decode,
    dropped_line,
    encode,
    pending_line,
    read_lines,
)
from spider_worker.pipelines.offline_gen.ledger import Ledger, State

_FLUSH_EVERY = 512  # lines


@dataclasses.dataclass
class Takeover:
    """``spent`` is what earlier attempts used; ``fed`` that they added the next unit; ``broken``
    the number of lines that could not be read."""

    spent: Spent = dataclasses.field(default_factory=Spent)
    fed: bool = False
    retry: bool = False
    broken: int = 0


def take_over(
    previous: Sequence[Path],
    committed: ShardFile | None,
    ledger: Ledger,
    journal: Journal,
    *,
    priced: bool,
) -> Takeover:
    """Copy what is good into ``journal`` and enter it into ``ledger``. Blocking.

    ``committed`` is the shard this unit was committed with, or None. The journal's ``ready``
    line is written last. Raises OSError.
    """
    taken = Takeover()
    files: list[tuple[Path, Ledger]] = []
    for path in previous:
        found = Ledger(ledger.start, ledger.stop, ledger.samples)
        scan = _scan(path, found)
        taken.broken += scan.broken
        if scan.is_journal:
            if scan.ready:
                files = [(path, found)]
                taken.spent, taken.fed, taken.retry = scan.spent, scan.fed, False
        else:
            files.append((path, found))
            taken.retry = True
            if committed is not None and committed.path == path:
                taken.spent = _spent_for(committed, priced)
                if committed.complete:
                    _mark_dropped(found, int(committed.counters.get("rows_done", 0)))
    _copy(files, ledger, journal, retry=taken.retry)
    if taken.fed:
        journal.fed()
    journal.ready(taken.spent)
    return taken


@dataclasses.dataclass
class _Scan:
    is_journal: bool = False
    ready: bool = False
    fed: bool = False
    broken: int = 0
    spent: Spent = dataclasses.field(default_factory=Spent)


def _scan(path: Path, found: Ledger) -> _Scan:
    scan = _Scan()
    for line in read_lines(path):
        document = line.document
        if line.kind is LineKind.JOURNAL:
            scan.is_journal = True
        elif line.kind is LineKind.READY:
            # Lines so far were copies: their tokens are in this figure.
            scan.ready, scan.spent = True, Spent(**document["spent"])
        elif line.kind is LineKind.FED:
            scan.fed = True
        elif line.kind is LineKind.BROKEN:
            scan.broken += 1
        else:
            _enter(line, found, scan.spent)
    return scan


def _enter(line: Line, found: Ledger, spent: Spent) -> None:
    document = line.document
    if line.kind is LineKind.PENDING:
        document = document["record"]
    slot = found.slot(document["index"], document["sample"])
    if slot is None:
        return
    if line.kind is LineKind.DROPPED:
        state = State.DROPPED
    elif line.kind is LineKind.PENDING:
        state = State.PENDING
        spent.add(document["usage"])
    else:
        state = State.OK if document.get("error") is None else State.ERROR
        # After a pending line the final one only repeats its usage, or has lost it.
        if found.state(slot) is State.MISSING and document.get("completion") is not None:
            spent.add(document.get("usage"))
    found.set(slot, state, line.offset, line.length)


def _spent_for(shard: ShardFile, priced: bool) -> Spent:
    counters = shard.counters
    unknown = int(priced and "cost_usd" not in counters)
    return Spent(
        int(counters.get("prompt_tokens", 0)), int(counters.get("completion_tokens", 0)), unknown
    )


def _mark_dropped(shard: Ledger, done: int) -> None:
    """A complete shard holds every row but those that a processor dropped. A stream may have
    ended inside its unit: rows beyond the ``done`` first ones never were."""
    for slot in range(min(done, len(shard))):
        if shard.state(slot) is State.MISSING:
            shard.set(slot, State.DROPPED)


def _copy(
    files: Sequence[tuple[Path, Ledger]], ledger: Ledger, journal: Journal, *, retry: bool
) -> None:
    handles = [path.open("rb") for path, _ in files]
    try:
        for slot in range(len(ledger)):
            for (_, found), handle in zip(reversed(files), reversed(handles), strict=True):
                state = found.state(slot)
                if state is not State.MISSING:
                    offset, length = found.place(slot)
                    handle.seek(offset)
                    _keep(slot, state, handle.read(length), ledger, journal, retry=retry)
                    break
            if slot % _FLUSH_EVERY == 0:
                journal.flush()
    finally:
        for handle in handles:
            handle.close()


def _keep(
    slot: int, state: State, text: bytes, ledger: Ledger, journal: Journal, *, retry: bool
) -> None:
    if state is State.DROPPED:
        text = dropped_line(*ledger.key(slot))
    elif state is State.ERROR and retry:
        pending = _without_error(text)
        if pending is None:
            return
        state, text = State.PENDING, pending
    ledger.set(slot, state, journal.append(text), len(text))


def _without_error(text: bytes) -> bytes | None:
    """An error row whose completion exists needs no second request: only its post-processing
    is run again. None where nothing was generated."""
    record: dict[str, Any] = decode(text)
    error = record.get("error") or {}
    if error.get("stage") != "post_processor" or record.get("completion") is None:
        return None
    return pending_line(encode({**record, "error": None}))
