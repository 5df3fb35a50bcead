"""Requests: what is retried and what is not, and every error in Spider's own words."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable

import httpx2
import pytest

from spider_sdk.errors import (
    ApiError,
    ConfigError,
    Conflict,
    NotFound,
    ServerBusy,
    ServerUnreachable,
    SpiderError,
    Unauthorized,
    UsageError,
)
from spider_sdk.transport import _ERRORS, RetryPolicy, Transport, job_path, map_error
from tests.support.scripted_server import (
    ScriptedServer,
    answer_bytes,
    answer_json,
    cut_before_answer,
    problem,
)

Connect = Callable[..., Transport]

THEIRS = sorted(
    (
        value
        for value in vars(httpx2).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ),
    key=lambda cls: cls.__name__,
)


@pytest.mark.parametrize("cls", THEIRS, ids=lambda cls: cls.__name__)
def test_no_error_of_httpx2_is_left_unmapped(cls: type[Exception]) -> None:
    assert cls in _ERRORS, "give it a line of its own, not its parent's"
    error = cls.__new__(cls)
    Exception.__init__(error, "reason")
    mapped = map_error(error, "http://there")
    assert isinstance(mapped, SpiderError)
    assert "http://there" in mapped.message


def test_there_are_errors_to_map() -> None:
    assert {"ConnectError", "RemoteProtocolError", "StreamClosed"} <= {c.__name__ for c in THEIRS}


def test_an_error_of_somebody_else_is_not_mapped() -> None:
    with pytest.raises(TypeError):
        map_error(KeyError("x"), "http://there")


def test_503_is_repeated_after_what_the_server_asked_for(
    server: ScriptedServer, connect: Connect, waits: list[float]
) -> None:
    busy = problem(503, "Redis is down", Retry_After="3")
    server.on("POST", "/v1/jobs", busy, busy, answer_json({"job_id": "j1"}, 201))
    answer = connect().json("POST", "/v1/jobs", json={}, headers={"Idempotency-Key": "k"})
    assert answer == {"job_id": "j1"}
    assert waits == [3.0, 3.0]
    keys = [seen.headers["idempotency-key"] for seen in server.seen]
    assert keys == ["k", "k", "k"]


def test_503_without_end_is_the_callers(server: ScriptedServer, connect: Connect) -> None:
    server.on("POST", "/v1/jobs", problem(503, "Redis is down"))
    with pytest.raises(ServerBusy, match="Redis is down") as caught:
        connect().request("POST", "/v1/jobs")
    assert caught.value.status == 503
    assert len(server.seen) == 4


def test_a_lost_answer_is_repeated_only_where_that_is_safe(
    server: ScriptedServer, connect: Connect
) -> None:
    server.on("POST", "/v1/jobs", cut_before_answer, answer_json({"job_id": "j1"}))
    server.on("POST", "/v1/other", cut_before_answer, answer_json({}))
    server.on("GET", "/v1/jobs", cut_before_answer, answer_json({"jobs": []}))
    transport = connect()
    assert transport.json("POST", "/v1/jobs", safe=True) == {"job_id": "j1"}
    assert transport.json("GET", "/v1/jobs") == {"jobs": []}
    with pytest.raises(ServerUnreachable, match="cut"):
        transport.request("POST", "/v1/other")
    assert len(server.requests("POST", "/v1/other")) == 1


def test_a_refused_first_connection_is_told_at_once(waits: list[float]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with (
            Transport(base_url=address, sleep=waits.append) as transport,
            pytest.raises(ServerUnreachable, match=f"cannot connect to {address}"),
        ):
            transport.request("GET", "/healthz")
    assert waits == []


def test_a_server_that_says_nothing_times_out(server: ScriptedServer, connect: Connect) -> None:
    server.on("GET", "/healthz", lambda handler: server.released.wait() and None)
    with pytest.raises(ServerUnreachable, match=r"server\.request_timeout"):
        connect(timeout=0.1).request("GET", "/healthz", retry=False)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ApiError),
        (401, Unauthorized),
        (403, Unauthorized),
        (404, NotFound),
        (409, Conflict),
        (422, Conflict),
        (429, ServerBusy),
        (500, ApiError),
    ],
)
def test_a_problem_document_becomes_its_error(
    server: ScriptedServer, connect: Connect, status: int, kind: type[ApiError]
) -> None:
    server.on("GET", "/x", problem(status, "this is why"))
    with pytest.raises(ApiError, match="this is why") as caught:
        connect().request("GET", "/x", retry=False)
    assert type(caught.value) is kind
    assert caught.value.status == status
    assert caught.value.problem["title"] == "refused"


def test_422_with_fields_reads_like_a_local_check(server: ScriptedServer, connect: Connect) -> None:
    fields = [
        {"path": "job.model.name", "message": "is missing", "line": 4},
        {"path": "job.source.split", "message": "expected text"},
    ]
    server.on("POST", "/v1/jobs", problem(422, "not valid", errors=fields))
    with pytest.raises(ConfigError) as caught:
        connect().request("POST", "/v1/jobs")
    assert [(p.path, p.message, p.line) for p in caught.value.problems] == [
        ("job.model.name", "is missing", 4),
        ("job.source.split", "expected text", None),
    ]


def test_another_server_at_the_address_is_told_apart(
    server: ScriptedServer, connect: Connect
) -> None:
    server.on("GET", "/v1/jobs", answer_bytes(b"<html>hello", kind="text/html"))
    server.on("GET", "/old", answer_bytes(b"", 302, Location="https://new.example/old"))
    with pytest.raises(ApiError, match="is a Spider API there"):
        connect().json("GET", "/v1/jobs")
    with pytest.raises(ApiError, match=r"redirects to https://new\.example/old"):
        connect().request("GET", "/old")


def test_key_and_headers_are_sent(server: ScriptedServer, connect: Connect) -> None:
    server.on("GET", "/x", answer_json({}))
    connect(api_key="sk_1_a\n", headers={"X-Team": "red"}).request("GET", "/x")
    assert server.seen[0].headers["authorization"] == "Bearer sk_1_a"
    assert server.seen[0].headers["x-team"] == "red"


def test_a_body_is_opened_anew_for_each_try(server: ScriptedServer, connect: Connect) -> None:
    server.on("PUT", "/x", problem(503, "busy"), answer_json({}))
    connect().request("PUT", "/x", body=lambda: io.BytesIO(b"rows"), safe=True)
    assert [seen.body for seen in server.seen] == [b"rows", b"rows"]


@pytest.mark.parametrize("url", ["", "127.0.0.1:9000", "ftp://host", "http://", "file:///etc"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="base_url"):
        Transport(base_url=url)


def test_a_key_that_no_header_can_carry_is_named() -> None:
    with pytest.raises(UsageError, match="api_key"):
        Transport(base_url="http://here", api_key="clé")


def test_no_name_climbs_out_of_its_path() -> None:
    assert job_path("a/b", "x y") == "/v1/jobs/a%2Fb/x%20y"
    for name in ("", "..", "."):
        with pytest.raises(UsageError):
            job_path(name)


def test_waits_grow_to_a_cap_and_heed_the_server() -> None:
    policy = RetryPolicy(base=1.0, cap=4.0, longest=60.0)
    assert all(0.5 <= policy.delay(0) <= 1.0 for _ in range(20))
    assert all(2.0 <= policy.delay(9) <= 4.0 for _ in range(20))
    assert policy.delay(0, 7.0) == 7.0
    assert policy.delay(0, 3600.0) == 60.0
