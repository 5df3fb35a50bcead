"""Artifacts and inputs: files under one folder that the API and every worker share.

Layout, under ``SPIDER_ARTIFACTS``::

    inputs/ab/abcd…             uploaded data, named by its SHA-256
    jobs/<id>/job.json          the record as submitted, without secrets
    jobs/<id>/manifest/<stem>   what a unit committed, as the manifest in Redis has it
    jobs/<id>/files/<name>      immutable files; each name carries unit, fence and attempt
    jobs/<id>/scratch/<stem>/   what one attempt is writing
    jobs/<id>/logs/<holder>.log what the job's runners printed

A file counts only once the manifest (in Redis, written under the fence) names it; whatever
else lies there is an attempt that lost. No name from outside ever becomes a path: the
manifest maps names to paths, and inputs are named by their hash.
"""

from __future__ import annotations

__all__ = ["ArtifactEntry", "ArtifactStore", "InputStore"]

import dataclasses
import glob
import hashlib
import json
import mimetypes
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from spider_sdk.errors import ArtifactNotFound, UsageError
from spider_worker.fleet.connection import Client, fleet_errors
from spider_worker.fleet.names import job_key
from spider_worker.fleet.units import Claim

CHUNK = 1 << 20
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class ArtifactEntry:
    """One line of a manifest. ``path`` is relative to the artifacts' root; ``number`` orders
    shards and is None for other files; ``version`` differs between contents."""

    name: str
    path: str
    size: int
    media_type: str
    created_at: str
    unit: str
    version: str
    number: int | None = None
    complete: bool = True
    counters: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sha256: str | None = None

    def to_text(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str | bytes) -> ArtifactEntry:
        return cls(**json.loads(text))


class ArtifactStore:
    def __init__(self, client: Client, root: Path) -> None:
        self._redis = client
        self.root = root

    def folder(self, job_id: str, *parts: str) -> Path:
        """A folder of the job's, made if need be."""
        path = self.root / "jobs" / job_id / Path(*parts)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def write_job(self, job_id: str, record: Mapping[str, Any]) -> None:
        """Keep the record beside the artifacts, from which a lost Redis can be rebuilt."""
        _write_json(self.folder(job_id) / "job.json", record)

    def write_commit(
        self, claim: Claim, entries: Sequence[ArtifactEntry], **outcome: object
    ) -> None:
        """Keep what a unit committed beside its files, for the same purpose. ``outcome``:
        complete, counters, and for the end of a job its remote artifact."""
        document = {
            **{name: getattr(claim, name) for name in ("unit", "kind", "number", "spec", "fence")},
            **outcome,
            "at": time.time(),
            "entries": [dataclasses.asdict(entry) for entry in entries],
        }
        _write_json(self.folder(claim.job_id, "manifest") / f"{claim.stem}.json", document)

    def adopt(
        self,
        claim: Claim,
        file: Path,
        *,
        name: str,
        number: int | None = None,
        complete: bool = True,
        counters: Mapping[str, float] | None = None,
    ) -> ArtifactEntry:
        """Move a finished file to its immutable place, durably; the caller commits the entry.

        The file must lie on the artifacts' file system, so that the move is one rename. Asked
        again (the commit could not reach Redis), it finds the file where it went.
        """
        folder = self.folder(claim.job_id, "files")
        target = folder / f"{claim.stem}.{name.replace('/', '.')}"
        if file.exists() or not target.exists():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
            file.replace(target)
            _sync_folder(folder)
        return self.entry(
            claim, target, name=name, number=number, complete=complete, counters=counters
        )

    def discard(self, job_id: str, names: Sequence[str]) -> Callable[[], None]:
        """What deletes the files that these names mean now; to be called once the manifest names
        them no longer. A reader that has one open reads on."""
        paths = [self.path(entry) for entry in self.entries(job_id, names)]

        def delete() -> None:
            for path in paths:
                path.unlink(missing_ok=True)

        return delete

    def entry(
        self,
        claim: Claim,
        path: Path,
        *,
        name: str,
        number: int | None = None,
        complete: bool = True,
        counters: Mapping[str, float] | None = None,
    ) -> ArtifactEntry:
        return ArtifactEntry(
            name=name,
            path=str(path.relative_to(self.root)),
            size=path.stat().st_size,
            media_type=_media_type(name),
            created_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            unit=claim.unit,
            version=f"{claim.fence}.{claim.attempt[:8]}",
            number=number,
            complete=complete,
            counters=dict(counters or {}),
        )

    def manifest(self, job_id: str) -> dict[str, ArtifactEntry]:
        """Everything that is committed, journals (``journal/<unit>``) included."""
        with fleet_errors():
            raw = self._redis.hgetall(job_key(job_id, "manifest"))
        return {name.decode(): ArtifactEntry.from_text(text) for name, text in raw.items()}

    def entries(self, job_id: str, names: Sequence[str]) -> Sequence[ArtifactEntry]:
        """Those of ``names`` that are committed, in that order; costs the same whatever the
        size of the job."""
        with fleet_errors():
            texts = self._redis.hmget(job_key(job_id, "manifest"), names)
        return [ArtifactEntry.from_text(text) for text in texts if text is not None]

    def shards(self, job_id: str) -> list[ArtifactEntry]:
        """Committed work units, by number."""
        return [entry for entry in self.list(job_id) if entry.number is not None]

    def list(self, job_id: str) -> list[ArtifactEntry]:
        """What a client may download, shards in order first."""
        entries = [e for n, e in self.manifest(job_id).items() if not n.startswith("journal/")]
        return sorted(entries, key=lambda e: (e.number is None, e.number or 0, e.name))

    def open(self, job_id: str, name: str) -> Path:
        """Where the artifact of that name lies. Raises ArtifactNotFound."""
        with fleet_errors():
            text = self._redis.hget(job_key(job_id, "manifest"), name)
        if text is None or name.startswith("journal/"):
            raise ArtifactNotFound(f"job {job_id} has no artifact {name!r}")
        return self.path(ArtifactEntry.from_text(text))

    def path(self, entry: ArtifactEntry) -> Path:
        return self.root / entry.path

    def log_file(self, job_id: str, holder: str) -> Path:
        return self.folder(job_id, "logs") / f"{holder}.log"

    def logs(self, job_id: str) -> Iterator[bytes]:
        """The lines that the job's runners printed, runner by runner."""
        folder = self.root / "jobs" / job_id / "logs"
        for path in sorted(folder.glob("*.log"), key=lambda p: p.stat().st_mtime):
            with path.open("rb") as file:
                yield from file

    def drop_scratch(self, claim: Claim) -> None:
        """Delete what the attempts of a unit were writing, once its outcome is committed: of
        those that were killed nobody else would."""
        scratch = self.root / "jobs" / claim.job_id / "scratch"
        for folder in scratch.glob(f"{glob.escape(claim.unit)}.*"):
            if folder.name.rsplit(".", 2)[0] == claim.unit:
                shutil.rmtree(folder, ignore_errors=True)


class InputStore:
    """Uploaded data by content: the same file is stored once, whoever sends it."""

    def __init__(self, root: Path) -> None:
        self._root = root / "inputs"

    def path(self, sha256: str) -> Path:
        """Where an input lies, whether or not it is there. Raises UsageError for no hash."""
        if not SHA256.fullmatch(sha256):
            raise UsageError(f"{sha256!r} is not a SHA-256 in lower-case hexadecimal")
        return self._root / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def put(self, sha256: str, stream: IO[bytes], limit: int | None = None) -> int:
        """Store ``stream`` and return its size in bytes.

        Raises UsageError where the content has another hash or is longer than ``limit``
        bytes; nothing is kept then.
        """
        target = self.path(sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{secrets.token_hex(8)}")
        try:
            size = _copy(stream, temporary, sha256, limit)
            temporary.replace(target)
            _sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
        return size


def _copy(stream: IO[bytes], target: Path, sha256: str, limit: int | None) -> int:
    digest, size = hashlib.sha256(), 0
    with target.open("wb") as file:
        while chunk := stream.read(CHUNK):
            size += len(chunk)
            if limit is not None and size > limit:
                raise UsageError(f"the input is larger than {limit} bytes")
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != sha256:
        raise UsageError(f"the content's SHA-256 is {digest.hexdigest()}, not {sha256}")
    return size


def _write_json(target: Path, document: Mapping[str, Any]) -> None:
    """Whole or not at all, and durable."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _media_type(name: str) -> str:
    if name.endswith(".jsonl"):
        return "application/x-ndjson"
    if name.endswith(".parquet"):
        return "application/vnd.apache.parquet"
    return mimetypes.guess_type(name)[0] or "application/octet-stream"
