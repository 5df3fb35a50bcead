"""A job's output tree, kept on this machine while the job goes on.

The server's manifest says what is done. A unit's shard holds every attempt of one run of an
instance; its lines are appended to the tree's ``output.jsonl``, each once, and its log is put into
``infer_logs``. So nothing is fetched twice, what stands in the file already (a verdict, say) stays,
and at the end of the job the file has what the job's own one has. Where a job makes a run that was
done before it, what it made is kept for what it cost, and the one before still counts. The versions
that a job was made with are known to its server alone; at its end they are put into the tree's
``metadata.json``.
"""

from __future__ import annotations

__all__ = ["Mirror", "run_name"]

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from spider_scaffold.jobfile import FOLDER, JobFile
from spider_sdk.client import Client
from spider_sdk.errors import ServerBusy, ServerUnreachable, UsageError
from spider_worker.trajectories.layout import INFER_LOGS, METADATA, Layout
from spider_worker.trajectories.metadata import read_metadata, take_versions
from spider_worker.trajectories.output_file import append, read, read_index
from spider_worker.trajectories.record import Key, Record

_SHARDS: Final = "shards/"
_PAUSE: Final = 2.0  #: seconds between two looks at the manifest, at least


def run_name(key: Key) -> str:
    """A run as a key of ``JobFile.bases``."""
    return f"{key[1]} {key[0]}"


class Mirror:
    """One job's. ``client`` is connected to its server; ``job`` is kept up to date in the tree."""

    def __init__(
        self,
        client: Client,
        job: JobFile,
        layout: Layout,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert job.job_id is not None
        self._client = client
        self._job = job
        self._job_id = job.job_id
        self._layout = layout
        self._clock = clock
        self._pause = _PAUSE
        self._looked: float | None = None
        self._stale = True
        #: The version of the job's metadata that was looked at. Not in ``taken``: a command that
        #: goes on with a tree writes the tree's anew.
        self._versions: str | None = None
        index = read_index(layout.output)
        self._there = {(key, number) for key, group in index.attempts.items() for number in group}
        #: Of runs that nobody has judged, the attempt that counts.
        self._unjudged = {
            key: entry.attempt for key, entry in index.latest.items() if entry.resolved is None
        }
        self._done = {
            key
            for key, entry in index.latest.items()
            if entry.done and entry.attempt <= job.bases.get(run_name(key), 0)
        }

    def changed(self) -> None:
        """Something may be new on the server."""
        self._stale = True

    def catch_up(self) -> None:
        """Fetch what is new where there may be something, unless that was done just now. A server
        that does not answer is asked again the next time."""
        now = self._clock()
        if not self._stale or (self._looked is not None and now - self._looked < self._pause):
            return
        with contextlib.suppress(ServerUnreachable, ServerBusy):
            self.sync()
        self._looked = self._clock()
        # The list is as long as the job: looking must not take up the time of following.
        self._pause = max(_PAUSE, 10 * (self._looked - now))

    def sync(self) -> int:
        """Fetch everything that is new; the number of records that were added. Raises UsageError
        where the tree cannot be written, and as the client does."""
        added = 0
        try:
            for one in self._client.artifacts(self._job_id):
                added += self._take(one)
        except OSError as error:
            raise UsageError(f"{self._layout.root} cannot be written: {error}") from error
        finally:
            self._job.save(self._layout.root)
        self._stale = False
        return added

    def _take(self, one: Mapping[str, Any]) -> int:
        name = str(one["name"])
        version = f"{one['created_at']} {one['size']}"
        if name == METADATA and version != self._versions:
            with self._fetched(name) as path:
                take_versions(self._layout.metadata, read_metadata(path) or {})
            self._versions = version
        wanted = name.startswith((_SHARDS, f"{INFER_LOGS}/"))
        if not wanted or self._job.taken.get(name) == version:
            return 0
        added = 0
        if name.startswith(_SHARDS):
            with self._fetched(name) as shard:
                added = self._add(shard)
        else:
            self._client.download_artifact(self._job_id, name, self._layout.root)
        self._job.taken[name] = version
        return added

    @contextlib.contextmanager
    def _fetched(self, name: str) -> Iterator[Path]:
        """An artifact as a file, for a moment."""
        parent = self._layout.root / FOLDER
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="fetched-", dir=parent))
        try:
            yield self._client.download_artifact(self._job_id, name, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _add(self, shard: Path) -> int:
        added = 0
        for record in read(shard):
            attempt = record.attempt + self._job.bases.get(run_name(record.key), 0)
            if (record.key, attempt) in self._there and not self._judged_since(record, attempt):
                continue
            line = {**record.data, "attempt": attempt}
            append(self._layout.output, line, *self._done_before(record.key))
            self._there.add((record.key, attempt))
            self._unjudged.pop(record.key, None)
            if record.resolved is None:
                self._unjudged[record.key] = attempt
            added += 1
        return added

    def _judged_since(self, record: Record, attempt: int) -> bool:
        """Whether a run that counts here came without a verdict and has one now: its job was
        stopped while the tests ran, and gone on with."""
        return record.resolved is not None and self._unjudged.get(record.key) == attempt

    def _done_before(self, key: Key) -> list[Mapping[str, Any]]:
        """The line that counts of a run that was done before the job, to be the last one again."""
        if key not in self._done:
            return []
        index = read_index(self._layout.output)
        return [index.load(index.latest[key]).data]
