"""Keys: without one nothing, with one only what is one's own. Walks every route there is."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask

from spider_worker.fleet import Fleet
from tests.support.hand_run import HandRun, record

OPEN = {"/healthz", "/readyz"}


def routes(app: Flask, job: str) -> Iterator[tuple[str, str, str]]:
    """(method, rule, path of that job's) for every route of the app."""
    for rule in app.url_map.iter_rules():
        path = rule.rule.replace("<job_id>", job).replace("<sha256>", "0" * 64)
        path = re.sub(r"<path:name>", "shard-00000.jsonl", path)
        assert "<" not in path, rule
        for method in sorted((rule.methods or set()) - {"OPTIONS"}):
            yield method, rule.rule, path


@pytest.fixture
def job(ada: Any, fleet: Fleet) -> str:
    """A job of ada's that has something at every route."""
    job_id: str = ada.submit()
    run = HandRun(fleet, job_id)
    run.work(record(0))
    return job_id


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer sk_0000000000000000_" + "a" * 43],
)
def test_every_route_but_health_needs_a_key(
    app: Flask, job: str, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    closed = 0
    for method, rule, path in routes(app, job):
        answer = app.test_client().open(path, method=method, headers=headers)
        if rule in OPEN:
            assert answer.status_code == 200, rule
        else:
            assert answer.status_code == 401, (method, rule)
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
            closed += 1
    assert closed > 12
    unknown = app.test_client().get("/nothing-here", headers=headers)
    assert unknown.status_code == 401


def test_another_owners_job_is_a_404_at_every_route(
    app: Flask, ada: Any, bob: Any, job: str, fleet: Fleet
) -> None:
    before = fleet.jobs.get(job)
    walked = set()
    for method, rule, path in routes(app, job):
        if "<job_id>" not in rule:
            continue
        theirs = bob.open(method, path)
        nobodys = bob.open(method, path.replace(job, "f" * 16))
        assert theirs.status_code == 404, (method, rule)
        if method != "HEAD":
            assert theirs.json["title"] == nobodys.json["title"]
            assert theirs.text.replace(job, "") == nobodys.text.replace("f" * 16, "")
        walked.add(rule)
    assert len(walked) == 8
    assert fleet.jobs.get(job) == before


def test_a_revoked_key_is_refused_from_its_next_request_on(app: Flask, ada: Any) -> None:
    assert ada.get("/v1/jobs").status_code == 200
    ada.app.extensions["spider"].keys.revoke(ada.token.split("_")[1])
    assert ada.get("/v1/jobs").status_code == 401


def test_an_uploaded_input_is_shared_only_by_its_content(ada: Any, bob: Any) -> None:
    """Whoever can name the hash has the content; nobody can read it back."""
    data = b"hello"
    sha = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert ada.open("PUT", f"/v1/inputs/{sha}", input_stream=io.BytesIO(data)).status_code == 201
    assert bob.open("HEAD", f"/v1/inputs/{sha}").status_code == 200
    assert bob.get(f"/v1/inputs/{sha}").status_code == 405
