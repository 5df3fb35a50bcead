"""What every publisher must do, on the shipped fake and on the real one against the Hub
emulator."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from spider_sdk.config.model import HubConfig, JobConfig, ModelConfig, OutputConfig, SourceConfig
from spider_sdk.errors import AuthError
from spider_worker.sinks.base import PublishedShard, Publisher, ShardSource
from spider_worker.sinks.hub import build_publisher
from spider_worker.testing import FakePublisher
from tests.support.hub_emulator import READ_TOKEN, WRITE_TOKEN, HubEmulator

SUMMARY = {"rows_ok": 4, "rows_error": 1, "rows_dropped": 0, "cost_usd": None}


@dataclasses.dataclass
class World:
    """``files`` are the data files that stand in the repository, with their records' ids."""

    publisher: Publisher
    refused: Publisher  #: one that may not write
    files: Callable[[], dict[str, list[str]]]


@pytest.fixture(params=["fake", "real"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    if request.param == "fake":
        fake = FakePublisher()
        return World(
            fake,
            FakePublisher(allowed=False),
            lambda: {path: [row["id"] for row in rows] for path, rows in fake.files.items()},
        )
    hub: HubEmulator = request.getfixturevalue("hub")
    repo: str = request.getfixturevalue("repo_id")
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    job = JobConfig(
        model=ModelConfig("vllm", "org/teacher"),
        source=SourceConfig("org/questions", field="q"),
        output=OutputConfig("upload_hf", hf=HubConfig(repo)),
    )

    def publisher(token: str) -> Publisher:
        folder = tmp_path / token
        return build_publisher(job, token=token, work_dir=folder, state={})

    def files() -> dict[str, list[str]]:
        there = hub.repo(repo).files
        return {
            path: ids(blob.content) for path, blob in there.items() if path.endswith(".parquet")
        }

    return World(publisher(WRITE_TOKEN), publisher(READ_TOKEN), files)


def ids(parquet: bytes) -> list[str]:
    return [str(value) for value in pq.read_table(io.BytesIO(parquet))["id"].to_pylist()]


def record(index: int, error: dict[str, Any] | None = None) -> dict[str, Any]:
    made = {"id": f"{index}-0", "index": index, "sample": 0, "prompt": "q", "error": error}
    return {**made, "completion": None if error else f"a{index}"}


def failed(index: int) -> dict[str, Any]:
    text = {"stage": "generation", "type": "timeout", "message": "late", "traceback": None}
    return record(index, text)


def shard(number: int, records: Sequence[dict[str, Any]], version: str = "v1") -> ShardSource:
    return ShardSource(number, version, len(records), lambda: iter(records))


def by_number(shards: Sequence[PublishedShard]) -> dict[int, PublishedShard]:
    return {one.number: one for one in shards}


def test_who_may_not_write_is_told_first(world: World) -> None:
    with pytest.raises(AuthError):
        world.refused.check_access()
    world.publisher.check_access()


def test_it_grows_shard_by_shard(world: World) -> None:
    world.publisher.check_access()
    first = shard(0, [record(0), record(1)])
    second = shard(1, [record(2)])
    there = by_number(world.publisher.publish([first], {}))
    there = by_number(world.publisher.publish([first, second], there))
    assert {n: (one.version, one.rows) for n, one in there.items()} == {0: ("v1", 2), 1: ("v1", 1)}
    files = world.files()
    assert files == {there[0].path: ["0-0", "1-0"], there[1].path: ["2-0"]}


def test_error_rows_stay_away(world: World) -> None:
    world.publisher.check_access()
    shards = [shard(0, [record(0), failed(1)]), shard(1, [failed(2)])]
    there = by_number(world.publisher.publish(shards, {}))
    assert there[0].rows == 1
    assert (there[1].rows, there[1].path, there[1].sha256) == (0, "", "")
    assert world.files() == {there[0].path: ["0-0"]}


def test_a_repetition_changes_nothing_and_a_new_version_replaces(world: World) -> None:
    world.publisher.check_access()
    before = world.publisher.publish([shard(0, [failed(0), record(1)])], {})
    again = world.publisher.publish([shard(0, [failed(0), record(1)])], {})
    assert again == before
    retried = shard(0, [record(0), record(1)], "v2")
    (after,) = world.publisher.publish([retried], by_number(again))
    assert (after.path, after.version, after.rows) == (before[0].path, "v2", 2)
    assert world.files() == {after.path: ["0-0", "1-0"]}


def test_the_end_removes_what_no_longer_exists(world: World) -> None:
    world.publisher.check_access()
    one, two = shard(0, [record(0)]), shard(1, [record(1)])
    there = by_number(world.publisher.publish([one, two], {}))
    emptied = shard(1, [failed(1)], "v2")
    there = by_number(world.publisher.publish([one, emptied], there))
    url = world.publisher.finish(there, SUMMARY)
    assert url.startswith("http")
    assert world.files() == {there[0].path: ["0-0"]}
    assert isinstance(world.publisher.state(), dict)
