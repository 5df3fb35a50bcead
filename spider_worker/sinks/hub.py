"""Publishing a job's shards to a dataset repository on the Hub.

Every shard has one file whose name follows from its number, so publishing again overwrites
and never duplicates. All files share one Arrow schema (``schema.py``); when a new shard
widens it, the others are written again in the same publication. Before each commit the
repository itself is looked at: whatever already stands there with the right content is left
out, which is what makes a crash anywhere, a lost answer and a foreign commit harmless.
"""

from __future__ import annotations

__all__ = ["HubPublisher", "build_publisher"]

import dataclasses
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from spider_sdk.config.model import JobConfig
from spider_sdk.errors import AuthError, FatalJobError, NotSupported
from spider_sdk.records import Record
from spider_worker.sinks.base import PublishedShard, ShardSource
from spider_worker.sinks.card import CardFacts, check_card, data_folder, render_card
from spider_worker.sinks.hub_repo import HubRepo, Operation
from spider_worker.sinks.parquet import write_parquet
from spider_worker.sinks.schema import TableSchema

SPLIT: Final = "train"
MAX_FILES: Final = 100  #: files in one commit
MAX_BYTES: Final = 2 * 2**30  #: of Parquet on the local disk before it is committed

#: The Hub takes 128 commits an hour to one repository; the rest is left to its user.
COMMITS_PER_HOUR: Final = 100
_HOUR: Final = 3600.0


@dataclasses.dataclass(frozen=True)
class _Local:
    """A shard's Parquet file, waiting to be committed; ``path`` None: no good row."""

    shard: PublishedShard
    path: Path | None
    size: int


class HubPublisher:
    """A ``Publisher`` for one configuration of one dataset repository.

    ``work_dir`` holds Parquet files until they are committed. ``state`` is what ``state()``
    of the job's previous publisher gave. ``endpoint`` None: HF_ENDPOINT or the public Hub.
    ``sleep`` (seconds) is called before a retry and to stay under ``commits_per_hour``; it
    may raise to end the publication early, for instance when the job was cancelled.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        token: str | None,
        work_dir: Path,
        facts: CardFacts,
        private: bool = False,
        config_name: str | None = None,
        endpoint: str | None = None,
        state: Mapping[str, Any] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        commits_per_hour: int = COMMITS_PER_HOUR,
    ) -> None:
        if not token:
            raise AuthError(
                f"The output goes to the dataset {repo_id} on the Hub, but the job carries no "
                "HF_TOKEN. Export HF_TOKEN, a token with write access, where you submit the job; "
                "it is forwarded by itself for outputs to the Hub"
            )
        self._repo = HubRepo(repo_id, token=token, endpoint=endpoint, sleep=sleep)
        self._private = private
        self._config = config_name or "default"
        self._folder = data_folder(self._config)
        self._work_dir = work_dir
        self._facts = facts
        self._commits_per_hour = commits_per_hour
        state = state or {}
        self._kinds: Mapping[str, Any] | None = state.get("kinds")
        self._commit_times: list[float] = list(state.get("commit_times", ()))

    def check_access(self) -> None:
        """See ``Publisher``. Also refuses a README whose front matter could not be kept."""
        self._repo.ensure(private=self._private)
        self._repo.prove_write()
        check_card(self._repo.read_text("README.md", self._repo.head()))

    def state(self) -> dict[str, Any]:
        return {"kinds": self._kinds, "commit_times": self._commit_times}

    def publish(
        self, shards: Sequence[ShardSource], published: Mapping[int, PublishedShard]
    ) -> list[PublishedShard]:
        """See ``Publisher``."""
        if not shards:
            return []
        standing = {
            shard.number: published[shard.number]
            for shard in shards
            if self._kinds is not None and _is_current(shard, published)
        }
        standing = self._really_there(standing)
        schema, widened = self._schema([s for s in shards if s.number not in standing])
        due = [s for s in shards if widened or s.number not in standing]
        known = {shard.number for shard in shards}
        for batch in self._batches(due, schema):
            standing |= {local.shard.number: local.shard for local in batch}
            self._push(batch, known, standing, schema, counts=None)
        if not due:
            self._push([], known, standing, schema, counts=None)
        self._kinds = schema.kinds
        return [standing[number] for number in sorted(standing)]

    def finish(self, published: Mapping[int, PublishedShard], summary: Mapping[str, Any]) -> str:
        """See ``Publisher``. ``summary`` holds the job's counters."""
        schema = TableSchema(self._kinds, exclude=["error"])
        self._push([], set(published), published, schema, counts=summary)
        return self._repo.url

    # What is to be done --------------------------------------------------------------

    def _path(self, number: int) -> str:
        return f"{self._folder}/{SPLIT}-{number:05d}.parquet"

    def _is_ours(self, path: str) -> bool:
        pattern = rf"{re.escape(self._folder)}/{SPLIT}-\d{{5,}}\.parquet"
        return re.fullmatch(pattern, path) is not None

    def _really_there(self, standing: dict[int, PublishedShard]) -> dict[int, PublishedShard]:
        """Those whose file is on the Hub with the content that was published."""
        if not standing:
            return {}
        remote = self._repo.files(self._folder, self._repo.head())
        return {
            number: shard
            for number, shard in standing.items()
            if not shard.path
            or (shard.path in remote and remote[shard.path].sha256 == shard.sha256)
        }

    def _schema(self, fresh: Sequence[ShardSource]) -> tuple[TableSchema, bool]:
        """The schema that also holds ``fresh``, and whether files of the old one differ."""
        schema = TableSchema(self._kinds, exclude=["error"])
        before = schema.arrow()
        for shard in fresh:
            for record in _good(shard):
                schema.add(record)
        return schema, self._kinds is not None and schema.arrow() != before

    def _batches(
        self, shards: Sequence[ShardSource], schema: TableSchema
    ) -> Iterator[list[_Local]]:
        """The shards as local files, as many at a time as go into one commit. The files
        are gone when the next batch is asked for."""
        self._work_dir.mkdir(parents=True, exist_ok=True)
        batch: list[_Local] = []
        try:
            for shard in shards:
                batch.append(self._write(shard, schema))
                if len(batch) >= MAX_FILES or sum(local.size for local in batch) >= MAX_BYTES:
                    yield batch
                    _remove(batch)
                    batch = []
            if batch:
                yield batch
        finally:
            _remove(batch)

    def _write(self, shard: ShardSource, schema: TableSchema) -> _Local:
        path = self._work_dir / f"{self._config}-{shard.number:05d}.parquet"
        rows = write_parquet(_good(shard), path, schema)
        if rows == 0:
            path.unlink()
            return _Local(PublishedShard(shard.number, shard.version, "", 0, ""), None, 0)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = self._path(shard.number)
        done = PublishedShard(shard.number, shard.version, name, rows, digest)
        return _Local(done, path, path.stat().st_size)

    # Doing it ------------------------------------------------------------------------

    def _push(
        self,
        batch: Sequence[_Local],
        known: set[int],
        standing: Mapping[int, PublishedShard],
        schema: TableSchema,
        counts: Mapping[str, Any] | None,
    ) -> None:
        """Commit what differs between the repository and the job; nothing, no commit.

        ``known`` are the numbers that the job has: files of ours with another one, and
        those of shards without rows, are removed.
        """

        def wanted(head: str) -> list[Operation]:
            return self._operations(head, batch, known, standing, schema, counts)

        if self._repo.settle(wanted, self._message(batch, counts), before=self._pace):
            self._commit_times.append(time.time())

    def _operations(
        self,
        head: str,
        batch: Sequence[_Local],
        known: set[int],
        standing: Mapping[int, PublishedShard],
        schema: TableSchema,
        counts: Mapping[str, Any] | None,
    ) -> list[Operation]:
        remote = self._repo.files(self._folder, head)
        operations: list[Operation] = []
        for local in batch:
            there = remote.get(local.shard.path)
            if local.path is not None and (there is None or there.sha256 != local.shard.sha256):
                operations.append(CommitOperationAdd(local.shard.path, local.path))
        empty = {self._path(s.number) for s in standing.values() if not s.path}
        wanted = {self._path(number) for number in known} - empty
        operations += [
            CommitOperationDelete(path)
            for path in sorted(remote)
            if self._is_ours(path) and path not in wanted
        ]
        existing = self._repo.read_text("README.md", head)
        if existing is not None and not operations and counts is None:
            return []  # the files came with their card, which finish may have completed since
        card = render_card(
            existing,
            self._facts,
            repo_id=self._repo.repo_id,
            config=self._config,
            split=SPLIT,
            rows=sum(shard.rows for shard in standing.values()),
            counts=counts,
            json_columns=tuple(schema.json_columns()),
        )
        if card != existing:
            operations.append(CommitOperationAdd("README.md", card.encode()))
        return operations

    def _message(self, batch: Sequence[_Local], counts: Mapping[str, Any] | None) -> str:
        if counts is not None:
            return f"Finish {self._config}"
        numbers = [local.shard.number for local in batch]
        if not numbers:
            return f"Tidy {self._config}"
        span = f"{min(numbers)} to {max(numbers)}" if len(numbers) > 1 else f"{numbers[0]}"
        return f"Add rows to {self._config}: shard {span}"

    def _pace(self) -> None:
        """Wait until another commit stays within the hour's share. The times are the wall
        clock's, because they are kept between processes."""
        now = time.time()
        recent = [moment for moment in self._commit_times if now - _HOUR < moment <= now]
        self._commit_times = recent[-self._commits_per_hour :]
        if len(recent) >= self._commits_per_hour:
            self._repo.sleep(recent[-self._commits_per_hour] + _HOUR - now)


def _good(shard: ShardSource) -> Iterable[Record]:
    """Records without an error: the others stay off the Hub."""
    return (record for record in shard if record.get("error") is None)


def _is_current(shard: ShardSource, published: Mapping[int, PublishedShard]) -> bool:
    there = published.get(shard.number)
    return there is not None and there.version == shard.version


def _remove(batch: Iterable[_Local]) -> None:
    for local in batch:
        if local.path is not None:
            local.path.unlink(missing_ok=True)


def build_publisher(
    job: JobConfig,
    *,
    token: str | None,
    work_dir: Path,
    state: Mapping[str, Any] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> HubPublisher:
    """The publisher of a job whose ``output.mode`` is ``upload_hf``.

    Raises NotSupported or FatalJobError for an output section that cannot be honoured,
    AuthError without a token.
    """
    hub = job.output.hf
    if hub is None:
        raise FatalJobError("output.mode is upload_hf, but output.hf (with repo_id) is missing")
    if hub.repo_type != "dataset":
        raise NotSupported(
            f"output.hf.repo_type: {hub.repo_type!r} is not supported for generated rows; they "
            "are published as a dataset (repo_type: dataset)"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub.repo_id):
        raise FatalJobError(
            f"output.hf.repo_id must be namespace/name, for instance my-org/my-data, "
            f"not {hub.repo_id!r}"
        )
    if hub.config_name is not None and not re.fullmatch(r"[\w.-]+", hub.config_name):
        raise FatalJobError(
            "output.hf.config_name may hold letters, digits, '.', '_' and '-', "
            f"not {hub.config_name!r}"
        )
    return HubPublisher(
        hub.repo_id,
        token=token,
        work_dir=work_dir,
        facts=CardFacts.from_job(job),
        private=hub.private,
        config_name=hub.config_name,
        state=state,
        sleep=sleep,
    )
