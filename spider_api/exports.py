"""Results as they leave: one JSON document, JSON lines, or a Parquet file."""

from __future__ import annotations

__all__ = ["json_document", "lines", "parquet"]

import hashlib
import logging
import secrets
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import orjson

from spider_sdk.errors import FleetError
from spider_sdk.jobs import StatusDocument
from spider_worker.fleet import Fleet, JobRecord

logger = logging.getLogger(__name__)

CHUNK: Final = 64 * 1024
EXPORT_TIMEOUT: Final = 3600.0  #: seconds for one Parquet file
_ABOUT_EVENTS: Final = frozenset(
    {"events", "events_next_offset", "events_start_offset", "events_truncated"}
)


def json_document(status: StatusDocument, records: Iterable[bytes]) -> Iterator[bytes]:
    """The job's fields (without its events) and ``artifact``, the list of records."""
    fields = {name: value for name, value in status.items() if name not in _ABOUT_EVENTS}

    def parts() -> Iterator[bytes]:
        yield orjson.dumps(fields)[:-1] + b',"artifact":['
        separator = b"\n"
        for record in records:
            yield separator + record
            separator = b",\n"
        yield b"]}\n"

    return _chunked(parts())


def lines(records: Iterable[bytes]) -> Iterator[bytes]:
    return _chunked(record + b"\n" for record in records)


def _chunked(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in larger pieces."""
    waiting: list[bytes] = []
    size = 0
    for part in parts:
        waiting.append(part)
        size += len(part)
        if size >= CHUNK:
            yield b"".join(waiting)
            waiting, size = [], 0
            # A quick reader's socket never blocks, and under gevent only what blocks lets
            # other clients have their turn.
            time.sleep(0)
    if waiting:
        yield b"".join(waiting)


def parquet(fleet: Fleet, record: JobRecord) -> Path:
    """The job's records as a Parquet file, which lies under a folder of the artifacts'.

    That of an ended job is kept until its records change; that of a running one is the
    caller's to delete (``is_terminal`` tells). Raises FleetError where it cannot be made.
    """
    folder = fleet.artifacts.folder(record.job_id, "exports")
    final = record.status.is_terminal
    name = _version(fleet, record.job_id) if final else f"partial-{secrets.token_hex(8)}"
    target = folder / f"{name}.parquet"
    if final and target.exists():
        return target
    source = folder / f".{secrets.token_hex(8)}.jsonl"
    try:
        with source.open("wb") as file:
            for chunk in lines(fleet.results.records(record.job_id)):
                file.write(chunk)
        _convert(source, target)
    finally:
        source.unlink(missing_ok=True)
    if final:
        for old in folder.glob("*.parquet"):
            if old != target and not old.name.startswith("partial-"):
                old.unlink(missing_ok=True)
    return target


def _version(fleet: Fleet, job_id: str) -> str:
    """A name that changes with the records."""
    manifest = fleet.artifacts.manifest(job_id)
    text = "\n".join(f"{name} {entry.version}" for name, entry in sorted(manifest.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _convert(source: Path, target: Path) -> None:
    command = [sys.executable, "-m", "spider_worker.export", str(source), str(target)]
    done = subprocess.run(  # noqa: S603 (our own program, on names that we made)
        command, capture_output=True, timeout=EXPORT_TIMEOUT, check=False
    )
    if done.returncode != 0:
        logger.error("Parquet export failed: %s", done.stderr.decode("utf-8", "replace"))
        raise FleetError("the records could not be written as Parquet; ask for format=jsonl")
