"""What every source must do, on the shipped fake and on the real ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.config.model import InputFile, SourceConfig
from spider_worker.sources.base import Source
from spider_worker.sources.build import build_source
from spider_worker.testing import InMemorySource

ROWS: list[dict[str, Any]] = [{"x": n, "text": f"row {n}"} for n in range(25)]


def fake(_folder: Path) -> Source:
    return InMemorySource(ROWS)


def fake_stream(_folder: Path) -> Source:
    return InMemorySource(ROWS, stream=True)


def real(folder: Path, *, streaming: bool = False) -> Source:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    inputs = (InputFile(path.name, "0" * 64),)
    config = SourceConfig(path.name, streaming=streaming, inputs=inputs)
    return build_source(config, {path.name: path}, seed=None, token=None)


def real_stream(folder: Path) -> Source:
    return real(folder, streaming=True)


@pytest.fixture(params=[fake, fake_stream, real, real_stream], ids=lambda make: make.__name__)
def source(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Source]:
    make: Callable[[Path], Source] = request.param
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    built = make(tmp_path)
    yield built
    built.close()


def test_rows_come_with_their_places(source: Source) -> None:
    batches = list(source.batches(0, None, 10))
    assert all(0 < len(batch) <= 10 for batch in batches)
    assert [row for batch in batches for row in batch] == list(enumerate(ROWS))


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (7, 19), (20, 25), (24, 25)])
def test_a_range_is_what_stands_there(source: Source, start: int, stop: int) -> None:
    found = [row for batch in source.batches(start, stop, 4) for row in batch]
    assert found == list(enumerate(ROWS))[start:stop]


@pytest.mark.parametrize(("start", "stop"), [(20, 100), (25, 30), (60, None), (5, 5)])
def test_it_ends_where_the_data_ends(source: Source, start: int, stop: int | None) -> None:
    found = [row for batch in source.batches(start, stop) for row in batch]
    assert found == list(enumerate(ROWS))[start:stop]


def test_ranges_may_be_read_in_any_order_and_left_in_the_middle(source: Source) -> None:
    for start in (10, 0, 10):
        for batch in source.batches(start, None, 3):
            assert batch[0] == (start, ROWS[start])
            break


def test_it_says_what_it_knows(source: Source) -> None:
    assert source.count() in (25, None)
    assert source.columns() in (["x", "text"], None)
    if source.count() is not None:
        assert source.columns() is not None
