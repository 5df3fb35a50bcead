"""The journal of a unit: rows appended as they finish, and read back by the next attempt.

JSON Lines. A finished record stands bare on its line, so that the shard is cut out of the
journal without encoding a row twice; every other line starts with ``{"spider":``:

``journal``   the first line, which tells a journal from a shard
``ready``     everything before it was taken over from earlier attempts; carries the tokens
              those attempts spent. Without it the file is an unfinished copy and is ignored
``pending``   a completion that the post-processor has still to see: paid for, so never lost
``dropped``   a row that a processor answered with None: it is not to be asked for again
``fed``       the source (of unknown length) goes on after this unit; the next one was added

Lines are written with one ``os.write`` a turn of the event loop, which survives the end of
this process by any means (a shard, not a journal, must survive the end of the machine).
"""

from __future__ import annotations

__all__ = [
    "Journal",
    "Line",
    "LineKind",
    "Spent",
    "decode",
    "dropped_line",
    "encode",
    "pending_line",
    "read_lines",
]

import asyncio
import dataclasses
import enum
import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

_HEADER = b'{"spider":"journal","format":1}\n'
_OWN = b'{"spider":'
_FED = b'{"spider":"fed"}\n'


def encode(document: Any) -> bytes:
    """JSON without a newline. Whole numbers beyond 64 bits and lone surrogates, which orjson
    refuses, take the slow way."""
    try:
        return orjson.dumps(document)
    except TypeError:
        return json.dumps(document, separators=(",", ":")).encode()


def decode(text: bytes) -> Any:
    """The inverse of ``encode``. Raises ValueError."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)


def pending_line(record: bytes) -> bytes:
    """``record`` is encoded JSON."""
    return b'{"spider":"pending","record":%b}\n' % record


def dropped_line(index: int, sample: int) -> bytes:
    return b'{"spider":"dropped","index":%d,"sample":%d}\n' % (index, sample)


@dataclasses.dataclass
class Spent:
    """Tokens that endpoints reported, and the number of completions they said nothing about."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    unknown: int = 0

    def add(self, usage: Mapping[str, Any] | None) -> None:
        """Count one record's ``usage``; a missing number makes the cost unknown."""
        prompt = usage.get("prompt_tokens") if usage else None
        completion = usage.get("completion_tokens") if usage else None
        self.prompt_tokens += prompt or 0
        self.completion_tokens += completion or 0
        if prompt is None or completion is None:
            self.unknown += 1


class LineKind(enum.Enum):
    RECORD = enum.auto()  #: a finished record (an error row included)
    JOURNAL = enum.auto()
    READY = enum.auto()
    PENDING = enum.auto()
    DROPPED = enum.auto()
    FED = enum.auto()
    BROKEN = enum.auto()  #: not a whole JSON object; its row counts as missing


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """A line of a journal or shard: where its bytes lie (newline included) and what it says."""

    kind: LineKind
    offset: int
    length: int
    document: Mapping[str, Any]


_KINDS = {kind.name.lower(): kind for kind in LineKind if kind is not LineKind.BROKEN}


def read_lines(path: Path) -> Iterator[Line]:
    """The whole lines of a file, in order; what follows the last newline was torn off by the
    end of its writer and is left out."""
    with path.open("rb") as file:
        offset = 0
        for text in file:
            if not text.endswith(b"\n"):
                return
            yield _parse(text, offset)
            offset += len(text)


def _parse(text: bytes, offset: int) -> Line:
    try:
        document = decode(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        return Line(LineKind.BROKEN, offset, len(text), {})
    kind = LineKind.RECORD
    if text.startswith(_OWN):
        kind = _KINDS.get(str(document["spider"]), LineKind.BROKEN)
    return Line(kind, offset, len(text), document)


class Journal:
    """This attempt's journal, open for appending.

    ``on_error`` hears of a scheduled write that failed (a full disk), for which no caller waits.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.on_error: Callable[[OSError], None] | None = None
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._end = os.fstat(self._fd).st_size
        self._buffer: list[bytes] = []
        self._scheduled = False
        if self._end == 0:
            self.append(_HEADER)

    def append(self, line: bytes) -> int:
        """Queue a whole line; it is written by the end of this turn of the loop, or by
        ``flush``. Returns its offset."""
        offset = self._end
        self._end += len(line)
        self._buffer.append(line)
        return offset

    def schedule(self) -> None:
        """Have what was appended written at the end of this turn of the event loop."""
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._flush_scheduled)

    def ready(self, spent: Spent) -> None:
        """Mark the end of what was taken over, and write it all."""
        document = {"spider": "ready", "spent": dataclasses.asdict(spent)}
        self.append(encode(document) + b"\n")
        self.flush()

    def fed(self) -> None:
        self.append(_FED)
        self.flush()

    def flush(self) -> None:
        """Write everything appended so far. Raises OSError."""
        if not self._buffer:
            return
        view = memoryview(b"".join(self._buffer))
        self._buffer.clear()
        while view:
            view = view[os.write(self._fd, view) :]

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of a line that was appended earlier."""
        self.flush()
        return os.pread(self._fd, length, offset)

    def map(self) -> mmap.mmap:
        """The whole file, read-only and paged in by the kernel as it is touched."""
        self.flush()
        return mmap.mmap(self._fd, 0, prot=mmap.PROT_READ)

    def close(self) -> None:
        """Write the rest and close. Idempotent. Raises OSError."""
        if self._fd >= 0:
            try:
                self.flush()
            finally:
                os.close(self._fd)
                self._fd = -1

    def _flush_scheduled(self) -> None:
        self._scheduled = False
        if self._fd < 0:
            return
        try:
            self.flush()
        except OSError as error:
            if self.on_error is None:
                raise
            self.on_error(error)
