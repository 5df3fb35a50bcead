"""A real Redis and a fleet with a short lease on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spider_worker.fleet import Fleet
from spider_worker.settings import FleetSettings
from tests.support.redis_server import RedisServer


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def fleet(redis_server: RedisServer, tmp_path: Path) -> Iterator[Fleet]:
    settings = FleetSettings(
        redis_url=redis_server.url,
        artifacts=tmp_path / "artifacts",
        secret_key_file=tmp_path / "secret.key",
        lease=2.0,
        backoff=0.05,
        hint_after=0.2,
    )
    fleet = Fleet.connect(settings)
    fleet.redis.flushall()
    yield fleet
    fleet.close()
