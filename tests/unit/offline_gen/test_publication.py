"""Publishing while the job runs, at its end, again, and after a retry."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.config.model import GenerationConfig, HubConfig, OutputConfig
from spider_sdk.errors import AuthError, RowError
from spider_worker.testing import FakeEngine, FakePublisher
from tests.unit.offline_gen.jobs import Setup

HUB = OutputConfig(mode="upload_hf", hf=HubConfig("me/data"))


def bad_row(messages: Any, params: Any) -> str:
    if messages[-1]["content"] == "q5":
        raise RowError("bad", stage="generation", kind="bad")
    return "fine"


def test_good_rows_are_pushed_as_the_job_runs_and_the_card_last(tmp_path: Path) -> None:
    hub = FakePublisher()
    generation = GenerationConfig(upload_every=4)
    setup = Setup(tmp_path, publisher=hub, output=HUB, generation=generation)
    setup.engine = FakeEngine(bad_row)
    done = setup.go()
    assert done.result.remote_artifact == "https://hub.invalid/datasets/fake"
    assert len(hub.commits) > 1
    indices = [row["index"] for path in sorted(hub.files) for row in hub.files[path]]
    assert indices == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert hub.card is not None
    assert hub.card["rows_ok"] == 9


def test_without_upload_every_all_is_pushed_at_once(tmp_path: Path) -> None:
    hub = FakePublisher()
    Setup(tmp_path, publisher=hub, output=HUB).go()
    assert [len(commit) for commit in hub.commits] == [3]


def test_finalising_twice_pushes_nothing_twice(tmp_path: Path) -> None:
    hub = FakePublisher()
    setup = Setup(tmp_path, publisher=hub, output=HUB)
    setup.go()
    setup.go()
    assert len(hub.commits) == 1


def test_a_retry_pushes_the_shards_that_it_changed(tmp_path: Path) -> None:
    hub = FakePublisher()
    setup = Setup(tmp_path, publisher=hub, output=HUB, engine=FakeEngine(bad_row))
    setup.go()
    setup.engine = FakeEngine()
    setup.go(retry=True)
    assert hub.commits[1:] == [["data/train-00001.parquet"]]
    assert [row["index"] for row in hub.files["data/train-00001.parquet"]] == [4, 5, 6, 7]


def test_the_right_to_write_is_checked_before_the_first_row(tmp_path: Path) -> None:
    engine = FakeEngine()
    hub = FakePublisher(allowed=False)
    with pytest.raises(AuthError, match="may not write"):
        Setup(tmp_path, publisher=hub, output=HUB, engine=engine).go()
    assert engine.asked == []


def test_a_job_without_a_good_row_pushes_nothing(tmp_path: Path) -> None:
    def script(messages: Any, params: Any) -> str:
        raise RowError("bad", stage="generation", kind="bad")

    hub = FakePublisher()
    done = Setup(tmp_path, publisher=hub, output=HUB, engine=FakeEngine(script)).go()
    assert done.result.error is not None
    assert hub.card is None


def test_publish_of_a_job_that_returns_its_data_does_nothing(tmp_path: Path) -> None:
    hub = FakePublisher()
    setup = Setup(tmp_path, publisher=hub)

    async def main() -> None:
        await setup.run()
        await setup.pipeline().publish(setup.context())

    asyncio.run(main())
    assert hub.commits == []
