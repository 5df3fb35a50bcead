"""A job's records as a reader sees them: committed shards, and journals where there is none yet."""

from __future__ import annotations

__all__ = ["FINAL_LINES", "Results"]

from collections.abc import Iterator
from typing import IO, Final

from spider_sdk.errors import ArtifactNotFound
from spider_worker.fleet.artifacts import ArtifactEntry, ArtifactStore

#: How the line of a finished record begins, in shards and journals alike: a row's, and that of a
#: coding agent's run. Other lines of a journal (a completion that waits for its post-processor, a
#: dropped row, an agent's turn) are not results.
FINAL_LINES: Final = (b'{"id":', b'{"instance_id":')
#: How often a unit's file may be replaced between two looks at the manifest.
REPLACED: Final = 10


class Results:
    """Memory does not grow with the job: lines are streamed from their files."""

    def __init__(self, artifacts: ArtifactStore) -> None:
        self._artifacts = artifacts

    def has(self, job_id: str) -> bool:
        """Is there at least one record?"""
        return next(self.records(job_id), None) is not None

    def records(self, job_id: str) -> Iterator[bytes]:
        """Every record, one JSON object without its newline, by unit.

        Within a unit, rows are in order once it is committed, in order of completion before.
        """
        for entry in self._current(job_id):
            with self._open(job_id, entry) as file:
                for line in file:
                    # A journal's last line may still be on its way to the disk.
                    if line.endswith(b"\n") and line.startswith(FINAL_LINES):
                        yield line[:-1]

    def _open(self, job_id: str, entry: ArtifactEntry) -> IO[bytes]:
        """The unit's file, or what replaced it: a journal goes when its shard is committed,
        which may be long after the manifest was read. An open file stays readable."""
        names = (f"journal/{entry.unit}", f"shards/{entry.unit}.jsonl")
        for _ in range(REPLACED):
            try:
                return self._artifacts.path(entry).open("rb")
            except FileNotFoundError:
                now = self._artifacts.entries(job_id, names)
                if not now or now[0] == entry:
                    raise
                entry = now[0]
        raise ArtifactNotFound(f"{entry.unit} of job {job_id} is replaced faster than it is read")

    def _current(self, job_id: str) -> list[ArtifactEntry]:
        """A unit's journal while an attempt runs (it holds what its shard held), else its shard."""
        manifest = self._artifacts.manifest(job_id)
        newest: dict[str, ArtifactEntry] = {}
        names = sorted(manifest, key=lambda name: name.startswith("journal/"))
        for entry in map(manifest.__getitem__, names):
            if entry.number is not None:
                newest[entry.unit] = entry
        return sorted(newest.values(), key=lambda entry: entry.number or 0)
