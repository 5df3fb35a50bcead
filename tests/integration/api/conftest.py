"""A real Redis, a fleet on it, and the app over both, for the API's tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from werkzeug.test import TestResponse

from spider_api.app import create_app
from spider_api.context import of
from spider_api.policy import Policy
from spider_api.settings import ApiSettings
from spider_worker.fleet import Fleet
from spider_worker.settings import FleetSettings
from tests.support.redis_server import RedisServer

JOB: dict[str, Any] = {
    "model": {"provider": "openai", "name": "m", "base_url": "https://models.example/v1"},
    "source": {"dataset": "org/data", "field": "question"},
}


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def fleet_settings(redis_server: RedisServer, tmp_path: Path) -> FleetSettings:
    return FleetSettings(
        redis_url=redis_server.url,
        artifacts=tmp_path / "artifacts",
        secret_key_file=tmp_path / "secret.key",
    )


@pytest.fixture
def fleet(fleet_settings: FleetSettings) -> Iterator[Fleet]:
    fleet = Fleet.connect(fleet_settings)
    fleet.redis.flushall()
    yield fleet
    fleet.close()


@pytest.fixture
def settings() -> ApiSettings:
    return ApiSettings(max_body=100_000, max_input=1_000_000, sse_heartbeat=0.2, max_active_jobs=20)


@pytest.fixture
def app(fleet: Fleet, settings: ApiSettings) -> Iterator[Flask]:
    policy = Policy(resolve=lambda host, port: ["93.184.216.34"])
    app = create_app(settings, fleet, policy=policy)
    yield app
    of(app).close()


@dataclasses.dataclass
class User:
    """A client of the API with a key of its own."""

    app: Flask
    name: str
    token: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def open(self, method: str, path: str, **options: Any) -> TestResponse:
        headers = {**self.headers, **options.pop("headers", {})}
        options.setdefault("buffered", True)
        return self.app.test_client().open(path, method=method, headers=headers, **options)

    def get(self, path: str, **options: Any) -> TestResponse:
        return self.open("GET", path, **options)

    def post(self, path: str, json: Any = None, **options: Any) -> TestResponse:
        return self.open("POST", path, json=json, **options)

    def submit(self, env: dict[str, str] | None = None, **job: Any) -> str:
        answer = self.post("/v1/jobs", {"job": {**JOB, **job}, "env": env or {}})
        assert answer.status_code == 201, answer.text
        job_id: str = answer.json["job_id"]
        return job_id


def user(app: Flask, name: str) -> User:
    return User(app, name, of(app).keys.create(name)[1])


@pytest.fixture
def ada(app: Flask) -> User:
    return user(app, "ada")


@pytest.fixture
def bob(app: Flask) -> User:
    return user(app, "bob")
