"""``output.jsonl``: appended to line by line, read whatever a crash has left, replaced whole.

A writer that dies leaves at most one torn line, at the end. Readers pass over it, and the next
writer takes it away. Writers in several processes take turns under a lock of the file; a reader
needs none.
"""

from __future__ import annotations

__all__ = ["Entry", "Index", "append", "read", "read_index", "rewrite"]

import contextlib
import dataclasses
import fcntl
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from spider_sdk.errors import UsageError
from spider_worker.sinks.atomic import atomic_path, sync_folder
from spider_worker.sinks.jsonl import dump_record
from spider_worker.trajectories.record import Key, Record, charge_of

_BLOCK: Final = 1 << 16


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of the file: where it is (bytes), and what is asked of it most often."""

    offset: int
    length: int
    key: Key
    attempt: int
    status: str
    done: bool
    resolved: bool | None
    cost: float | None  #: US dollars of this attempt; None where unknown
    charge: float  #: what it counts with against a cap on money


@dataclasses.dataclass(frozen=True)
class Index:
    """The file in small. ``latest`` is the line that counts for each run, in the order in which
    the runs first appeared; ``attempts`` the last line of each of their attempts, by number."""

    path: Path
    latest: Mapping[Key, Entry]
    attempts: Mapping[Key, Mapping[int, Entry]]

    @property
    def done(self) -> frozenset[Key]:
        """The runs that a resume leaves alone."""
        return frozenset(key for key, entry in self.latest.items() if entry.done)

    def next_attempt(self, key: Key) -> int:
        """The number of a further attempt, from 1."""
        return 1 + max(self.attempts.get(key, ()), default=0)

    def cost(self, key: Key | None = None) -> tuple[float | None, int]:
        """US dollars spent on a run (None: on all) over all its attempts, failed ones included,
        and the number of attempts whose cost is unknown. None where no attempt's is known."""
        groups = self.attempts.values() if key is None else [self.attempts.get(key, {})]
        entries = list(itertools.chain.from_iterable(group.values() for group in groups))
        known = [entry.cost for entry in entries if entry.cost is not None]
        return (sum(known) if known else None), len(entries) - len(known)

    @property
    def charged(self) -> float:
        """US dollars that all attempts count with against a cap on money."""
        return sum(entry.charge for group in self.attempts.values() for entry in group.values())

    def load(self, entry: Entry) -> Record:
        """Read one line again."""
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            return _parse(file.read(entry.length))


def read(path: Path) -> Iterator[Record]:
    """The records line by line; nothing where there is no file. Raises UsageError for a line,
    other than a torn last one, that is no record."""
    for record, _, _ in _lines(path):
        yield record


def read_index(path: Path) -> Index:
    """Go through the file once, holding one record at a time. Raises as ``read``."""
    latest: dict[Key, Entry] = {}
    attempts: dict[Key, dict[int, Entry]] = {}
    for record, offset, length in _lines(path):
        entry = Entry(
            offset,
            length,
            record.key,
            record.attempt,
            record.status,
            record.done,
            record.resolved,
            record.cost,
            charge_of(record.metrics),
        )
        latest[record.key] = entry
        attempts.setdefault(record.key, {})[record.attempt] = entry
    return Index(path, latest, attempts)


def append(path: Path, *records: Mapping[str, Any]) -> None:
    """Add a whole line for each record and sync; a torn line that stands at the end is removed
    first.

    Creates folder and file. Raises OSError where it cannot be written (a full disk), the file
    then as before.
    """
    lines = b"".join(dump_record(dict(record)) + b"\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as file:
        before = file.seek(0, os.SEEK_END)
        end, missing = _mend(file)
        file.truncate(end)
        file.seek(end)
        try:
            _write(file, missing + lines)
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise
    if before == 0:
        sync_folder(path.parent)


def rewrite(path: Path, change: Callable[[Record], Mapping[str, Any]]) -> int:
    """Replace every line, superseded ones too, by what ``change`` makes of it, in one step.
    Returns the number of lines. Raises FileNotFoundError, and as ``read``; the file is then as
    before."""
    count = 0
    if not path.exists():
        raise FileNotFoundError(path)
    with (
        _locked(path),
        atomic_path(path) as temporary,
        temporary.open("wb", buffering=1 << 20) as file,
    ):
        for record in read(path):
            file.write(dump_record(dict(change(record))) + b"\n")
            count += 1
    return count


def _lines(path: Path) -> Iterator[tuple[Record, int, int]]:
    offset = 0
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = _parse(line)
                except ValueError as error:
                    if not line.endswith(b"\n"):
                        return
                    raise UsageError(f"{path}, line {number}: {error}") from error
                yield record, offset, len(line)
            offset += len(line)


def _parse(line: bytes) -> Record:
    """Raises ValueError."""
    try:
        data = orjson.loads(line)
    except orjson.JSONDecodeError:
        # The standard library also takes half of a surrogate pair, which tools do print.
        data = json.loads(line)
    if not isinstance(data, dict) or not isinstance(data.get("instance_id"), str):
        raise ValueError("not a record (a JSON object with instance_id)")
    return Record(data)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[io.FileIO]:
    """The file, open for reading and writing, with every other writer waiting.

    It may be replaced while one waits for the lock; then the lock is of a file that is no longer
    there, and the new one has to be opened.
    """
    while True:
        with io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                same = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                same = False
            if same:
                yield file
                return


def _mend(file: io.FileIO) -> tuple[int, bytes]:
    """Where a new line may begin (bytes), and what has to be written before it: nothing, or the
    line feed that the last record lacks. A torn record is behind that place."""
    end = file.seek(0, os.SEEK_END)
    start = end
    tail = b""
    while start > 0 and b"\n" not in tail:
        step = min(_BLOCK, start)
        start -= step
        file.seek(start)
        tail = file.read(step) + tail
    last = tail[tail.rfind(b"\n") + 1 :]
    try:
        if last:
            _parse(last)
            return end, b"\n"
    except ValueError:
        pass
    return end - len(last), b""


def _write(file: io.FileIO, data: bytes) -> None:
    """All of it: one call may take a part alone."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
