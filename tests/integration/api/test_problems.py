"""Every error is a problem document, and none tells what is inside."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from spider_worker.fleet import Fleet
from tests.support.redis_server import RedisServer


def check(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.content_type == "application/problem+json"
    document: dict[str, Any] = answer.json
    assert document["status"] == status
    assert document["type"] == "about:blank"
    assert document["title"]
    assert document["detail"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    return document


def test_unknown_routes_and_methods(ada: Any) -> None:
    assert "/v2/jobs" in check(ada.get("/v2/jobs"), 404)["detail"]
    answer = ada.open("DELETE", "/v1/jobs")
    check(answer, 405)
    assert "POST" in answer.headers["Allow"]


def test_bodies(ada: Any) -> None:
    assert (
        "100000 bytes"
        in check(
            ada.open("POST", "/v1/jobs", data="x" * 100_001, content_type="application/json"), 413
        )["detail"]
    )
    check(ada.open("POST", "/v1/jobs", data="job: {}", content_type="application/yaml"), 415)
    for text in ("{", '{"job": NaN}', "[1]", "\xff", "[" * 50_000):
        check(ada.open("POST", "/v1/jobs", data=text, content_type="application/json"), 400)
    missing = check(ada.post("/v1/jobs", {}), 422)
    assert missing["errors"] == [{"path": "job", "message": "Missing data for required field."}]
    for body, path in (
        ({"job": {}, "jobs": {}}, "jobs"),
        ({"job": []}, "job"),
        ({"job": {}, "env": {"A": 1}}, "env.A"),
        ({"job": {}, "env": []}, "env"),
    ):
        errors = check(ada.post("/v1/jobs", body), 422)["errors"]
        assert path in [error["path"] for error in errors]


def test_a_failure_of_ours_shows_nothing_of_itself(
    ada: Any, fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the secret inside")

    monkeypatch.setattr(fleet.jobs, "get", fail)
    document = check(ada.get("/v1/jobs/abc"), 500)
    assert "secret" not in str(document)
    assert "Traceback" not in str(document)
    number = document["detail"].rsplit(" ", 1)[1]
    assert number in caplog.text
    assert "the secret inside" in caplog.text


def test_redis_away_is_a_503_and_nothing_is_lost(
    ada: Any, fleet: Fleet, redis_server: RedisServer
) -> None:
    kept = ada.submit()
    redis_server.stop(signal.SIGKILL)
    try:
        for answer in (ada.get("/readyz"), ada.post("/v1/jobs", {"job": {}})):
            check(answer, 503)
            assert int(answer.headers["Retry-After"]) > 0
        assert ada.get("/healthz").status_code == 200
    finally:
        redis_server.start()
    assert ada.get("/readyz").status_code == 200
    assert [job["job_id"] for job in ada.get("/v1/jobs").json["jobs"]] == [kept]


def test_redis_full_is_a_503_and_accepts_nothing(ada: Any, fleet: Fleet) -> None:
    kept = ada.submit()
    job = ada.get(f"/v1/jobs/{kept}").json["job"]
    fleet.redis.config_set("maxmemory", 1)
    try:
        answer = ada.post("/v1/jobs", {"job": job})
        check(answer, 503)
        assert "no writes" in answer.json["detail"]
    finally:
        fleet.redis.config_set("maxmemory", 0)
    assert [job["job_id"] for job in ada.get("/v1/jobs").json["jobs"]] == [kept]
