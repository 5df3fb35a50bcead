"""What a sink is: records in, durable files out."""

from __future__ import annotations

__all__ = ["PublishedShard", "Publisher", "ShardSource"]

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from spider_sdk.records import Record


@dataclasses.dataclass(frozen=True)
class ShardSource:
    """A committed shard that could be published.

    ``number`` is the unit's place in the job (file names derive from it alone, so a
    second publication overwrites and never duplicates); ``version`` changes when the
    shard's content does (a retry); ``open`` streams its records in order.
    """

    number: int
    version: str
    rows: int
    records: Any  #: Callable[[], Iterator[Record]]

    def __iter__(self) -> Iterator[Record]:
        iterator: Iterator[Record] = self.records()
        return iterator


@dataclasses.dataclass(frozen=True)
class PublishedShard:
    """A shard as it stands on the Hub; ``rows`` excludes error rows.

    A shard without a good row has no file: ``path`` and ``sha256`` are then empty.
    """

    number: int
    version: str
    path: str
    rows: int
    sha256: str


class Publisher(Protocol):
    """Blocking; called from a thread by whoever holds the job's publication lease."""

    def check_access(self) -> None:
        """Create the repository if need be and prove the right to write to it.

        Raises AuthError with what to do about it.
        """

    def publish(
        self, shards: Sequence[ShardSource], published: Mapping[int, PublishedShard]
    ) -> list[PublishedShard]:
        """Make the repository hold exactly ``shards``, in few commits.

        ``shards`` are all that the job has committed so far, since a new one may need a
        wider schema and the others are then written again; ``published`` is what earlier
        calls returned (an empty one is safe, only slower). Shards that already stand there
        in their version are not touched. Returns what now stands there, by number.
        Repeating it after a crash duplicates nothing.
        """

    def state(self) -> dict[str, Any]:
        """JSON to be kept beside ``published`` and given to the next publisher of the job."""

    def finish(self, published: Mapping[int, PublishedShard], summary: Mapping[str, Any]) -> str:
        """Write the dataset card, remove files of shards that no longer exist; returns
        the repository's URL."""
