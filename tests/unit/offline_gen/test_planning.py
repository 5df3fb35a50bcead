"""How a job is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spider_sdk.config.model import GenerationConfig, JobConfig, ModelConfig, SourceConfig
from spider_worker.pipelines.offline_gen.planning import Rows, cut, shard_size


def job(parallelism: int | None = None, samples: int = 1, size: int | None = None) -> JobConfig:
    return JobConfig(
        model=ModelConfig(provider="vllm", name="m"),
        source=SourceConfig(dataset="d"),
        generation=GenerationConfig(duplications=samples),
        parallelism=parallelism,
        shard_size=size,
    )


@pytest.mark.parametrize(
    ("config", "rows", "in_flight", "size"),
    [
        (job(), 1_000, 64, 256),
        (job(), 10_000, 512, 1024),
        (job(), 1_000_000, 512, 4096),
        (job(parallelism=2), 10_000, 64, 1250),
        (job(samples=8), 10_000, 64, 312),
        (job(samples=5000), 10, 64, 1),
        (job(size=7), 1_000_000, 512, 7),
        (job(), None, 64, 256),
    ],
)
def test_shard_size(config: JobConfig, rows: int | None, in_flight: int, size: int) -> None:
    assert shard_size(config, rows, in_flight) == size


@given(rows=st.integers(1, 5_000), size=st.integers(1, 600))
def test_units_cover_every_row_once(rows: int, size: int) -> None:
    units = cut(rows, size)
    covered = [i for unit in units for i in range(unit.spec["start"], unit.spec["stop"])]
    assert covered == list(range(rows))
    assert [unit.number for unit in units] == list(range(len(units)))
    assert len({unit.id for unit in units}) == len(units)
    assert all(not Rows.from_spec(unit.spec).stream for unit in units)


def test_ledger_places_and_ranges(tmp_path: Path) -> None:
    from spider_worker.pipelines.offline_gen.ledger import Ledger, State

    ledger = Ledger(10, 14, 2)
    assert ledger.missing_range() == (10, 14)
    ledger.set(ledger.slot(10, 0) or 0, State.OK, 5, 3)
    ledger.set(ledger.slot(10, 1) or 0, State.DROPPED)
    ledger.set(ledger.slot(13, 1) or 0, State.ERROR)
    assert ledger.missing_range() == (11, 14)
    assert ledger.missing_samples(13) == [0]
    assert ledger.slot(14, 0) is None
    assert ledger.slot(9, 0) is None
    assert ledger.slot(10, 2) is None
    assert ledger.place(0) == (5, 3)
    assert [ledger.count(state) for state in State] == [5, 0, 1, 1, 1]
