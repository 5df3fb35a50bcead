"""Following a job over real sockets: each event once and in order, whatever the network does."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest

from spider_sdk.errors import ApiError, NotFound, PollTimeout, ServerUnreachable
from spider_sdk.events import Event
from spider_sdk.live import Follower, JobView, Update
from spider_sdk.transport import Transport
from tests.support.scripted_server import (
    ScriptedServer,
    answer_bytes,
    cut_before_answer,
    event,
    event_stream,
    frame,
    job_status,
    named_frame,
    problem,
    status_document,
)

Connect = Callable[..., Transport]
JOB, EVENTS = "/v1/jobs/j1", "/v1/jobs/j1/events"
LOG = [
    event(0, "job.queued"),
    event(1, "unit.claimed"),
    event(2, "progress", metrics={"rows_done": 5}),
    event(3, "progress", metrics={"rows_done": 10}),
    event(4, "job.completed"),
]
FRAMES = [frame(entry) for entry in LOG]


@pytest.fixture
def follow(connect: Connect, waits: list[float]) -> Callable[..., Follower]:
    def build(**options: Any) -> Follower:
        return Follower(connect(), "j1", **{"sleep": waits.append, "interval": 0.01, **options})

    return build


def offsets(updates: list[Update]) -> list[int]:
    return [update.event.offset for update in updates if update.event is not None]


def test_a_whole_stream(server: ScriptedServer, follow: Callable[..., Follower]) -> None:
    end = named_frame("end", status_document("completed", LOG))
    server.on("GET", EVENTS, event_stream([*FRAMES[:4], b": beat\n\n", end], then="hold"))
    updates = list(follow())
    assert offsets(updates) == [0, 1, 2, 3, 4]
    assert updates[-1].final
    assert updates[-1].document is not None
    assert updates[-1].document["status"] == "completed"


def test_a_cut_stream_goes_on_after_the_last_event(
    server: ScriptedServer, follow: Callable[..., Follower]
) -> None:
    torn = FRAMES[2][: len(FRAMES[2]) // 2]
    server.on("GET", JOB, job_status("completed", LOG))
    server.on(
        "GET",
        EVENTS,
        event_stream([*FRAMES[:2], torn], then="cut"),
        cut_before_answer,
        problem(503, "starting"),
        event_stream(FRAMES[1:], then="hold"),  # one of them again
    )
    assert offsets(list(follow())) == [0, 1, 2, 3, 4]
    asked = [seen.headers.get("last-event-id") for seen in server.requests("GET", EVENTS)]
    assert asked == [None, "1-1", "1-1", "1-1"]


def test_a_stream_the_server_closes_is_opened_again(
    server: ScriptedServer, follow: Callable[..., Follower]
) -> None:
    server.on("GET", JOB, job_status("running", LOG[:4]), job_status("completed", LOG))
    server.on("GET", EVENTS, event_stream(FRAMES[:2]), event_stream(FRAMES[2:], then="hold"))
    assert offsets(list(follow())) == [0, 1, 2, 3, 4]


def test_a_stream_that_closes_with_the_job_over_ends(
    server: ScriptedServer, follow: Callable[..., Follower]
) -> None:
    server.on("GET", JOB, job_status("completed", LOG))
    server.on("GET", EVENTS, event_stream(FRAMES[:2]))
    updates = list(follow())
    assert offsets(updates) == [0, 1, 2, 3, 4]
    assert updates[-1].final
    assert len(server.requests("GET", EVENTS)) == 1


def test_since_skips_what_was_seen(server: ScriptedServer, follow: Callable[..., Follower]) -> None:
    server.on("GET", JOB, job_status("completed", LOG))
    server.on("GET", EVENTS, event_stream(FRAMES, then="hold"))
    assert offsets(list(follow(since=3))) == [3, 4]
    assert server.requests("GET", EVENTS)[0].headers["last-event-id"] == "2-1"


def test_a_terminal_event_before_a_retry_does_not_end_the_stream(
    server: ScriptedServer, follow: Callable[..., Follower]
) -> None:
    log = [
        event(0, "job.queued"),
        event(1, "job.failed"),
        event(2, "job.queued"),
        event(3, "job.completed"),
    ]
    server.on("GET", JOB, job_status("running", log[:3]), job_status("completed", log))
    server.on("GET", EVENTS, event_stream([frame(entry) for entry in log], then="hold"))
    updates = list(follow())
    assert [u.event.code for u in updates if u.event] == [entry["code"] for entry in log]


def test_reset_takes_the_snapshot(server: ScriptedServer, follow: Callable[..., Follower]) -> None:
    trimmed = status_document("running", LOG[3:4])
    server.on("GET", JOB, job_status("completed", LOG))
    server.on(
        "GET",
        EVENTS,
        event_stream([named_frame("reset", trimmed), FRAMES[3], FRAMES[4]], then="hold"),
    )
    updates = list(follow(since=1))
    assert offsets(updates) == [3, 4]
    assert trimmed in [update.document for update in updates]


def test_reset_to_a_log_that_began_anew(
    server: ScriptedServer, follow: Callable[..., Follower]
) -> None:
    anew = [event(0, "job.queued"), event(1, "job.completed")]
    server.on("GET", JOB, job_status("completed", anew))
    reset = named_frame("reset", status_document("running", anew[:1]))
    server.on("GET", EVENTS, event_stream([reset, frame(anew[1])], then="hold"))
    assert offsets(list(follow(since=40))) == [0, 1]


@pytest.mark.parametrize(
    "refusal",
    [
        problem(404, "no such route"),
        problem(406, "no streams here"),
        answer_bytes(b"<html>", kind="text/html"),
    ],
    ids=["404", "406", "html"],
)
def test_without_sse_it_polls(
    server: ScriptedServer, follow: Callable[..., Follower], waits: list[float], refusal: Any
) -> None:
    server.on("GET", EVENTS, refusal)
    server.on(
        "GET",
        JOB,
        job_status("queued", LOG[:1]),
        job_status("running", LOG[:3]),
        problem(503, "for a moment"),
        cut_before_answer,
        job_status("completed", LOG),
    )
    updates = list(follow(interval=5.0))
    assert offsets(updates) == [0, 1, 2, 3, 4]
    assert updates[-1].final
    assert 5.0 in waits
    assert len(server.requests("GET", EVENTS)) == 1


def test_a_proxy_that_holds_the_stream_back_leads_to_polling(
    server: ScriptedServer, follow: Callable[..., Follower], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spider_sdk.live.SILENCE", 0.1)
    server.on("GET", EVENTS, event_stream([], then="silence"))
    server.on("GET", JOB, job_status("completed", LOG))
    assert offsets(list(follow())) == [0, 1, 2, 3, 4]
    assert len(server.requests("GET", EVENTS)) == 2


def test_an_end_that_live_readers_missed_is_found(
    server: ScriptedServer, follow: Callable[..., Follower], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spider_sdk.live.RECHECK", 0.05)
    server.on("GET", JOB, job_status("completed", LOG))
    server.on("GET", EVENTS, event_stream(FRAMES[:3], then="hold"))
    assert offsets(list(follow())) == [0, 1, 2, 3, 4]


def test_a_job_that_is_not_there(server: ScriptedServer, follow: Callable[..., Follower]) -> None:
    with pytest.raises(NotFound):
        list(follow())


def test_a_server_that_stays_away_is_given_up(
    server: ScriptedServer, follow: Callable[..., Follower], waits: list[float]
) -> None:
    server.on("GET", EVENTS, cut_before_answer)
    ticks = itertools.count(0.0, 10.0)
    with pytest.raises(ServerUnreachable):
        list(follow(give_up_after=120.0, clock=lambda: next(ticks)))
    assert len(waits) > 2


def test_heartbeats_do_not_hide_the_deadline(
    server: ScriptedServer, follow: Callable[..., Follower]
) -> None:
    server.on("GET", EVENTS, event_stream(FRAMES[:1], then="hold"))
    beats = itertools.count(0.0, 1.0)
    with pytest.raises(PollTimeout, match="it goes on"):
        list(follow(deadline=20.0, clock=lambda: next(beats)))


def test_a_sign_of_life_is_an_update_with_nothing_in_it(
    server: ScriptedServer, follow: Callable[..., Follower]
) -> None:
    end = named_frame("end", status_document("completed", LOG))
    frames = [FRAMES[0], b": beat\n\n", FRAMES[1], end]
    server.on("GET", EVENTS, event_stream(frames, then="hold"))
    updates = list(follow())
    assert [update.quiet for update in updates[:3]] == [False, True, False]
    view = JobView(status_document("running", LOG[:1]))
    assert view.apply(updates[1]) == {**status_document("running", LOG[:1]), "events": []}


def test_nor_does_silence(server: ScriptedServer, connect: Connect) -> None:
    server.on("GET", EVENTS, event_stream(FRAMES[:1], then="silence"))
    with pytest.raises(PollTimeout):
        list(Follower(connect(), "j1", deadline=time.monotonic() + 0.2))


@pytest.mark.parametrize("data", [b"data: nonsense\n\n", b"data: []\n\n", b'data: {"a": 1}\n\n'])
def test_a_stream_of_something_else_is_an_error(
    server: ScriptedServer, follow: Callable[..., Follower], data: bytes
) -> None:
    server.on("GET", EVENTS, event_stream([data], then="hold"))
    with pytest.raises(ApiError):
        list(follow())


def test_unauthorized_is_not_retried(
    server: ScriptedServer, follow: Callable[..., Follower]
) -> None:
    server.on("GET", EVENTS, problem(401, "no key"))
    with pytest.raises(ApiError, match="SPIDER_API_KEY"):
        list(follow())
    assert len(server.seen) == 1


def test_a_view_follows_events() -> None:
    view = JobView(status_document("queued", metrics={"rows_total": 10}))
    for entry in [event(0, "job.running"), LOG[2]]:
        view.apply(Update(event=Event.from_json(entry)))
    assert view.document["status"] == "running"
    assert view.document["metrics"] == {"rows_total": 10, "rows_done": 5}
    assert view.document["events"] == [LOG[2]]
    assert view.document["events_next_offset"] == 3
    failed = view.apply(Update(event=Event.from_json(event(3, "job.failed", error="no rows"))))
    assert (failed["status"], failed["error"]) == ("failed", "no rows")
    again = view.apply(Update(event=Event.from_json(event(4, "job.queued"))))
    assert (again["status"], again["error"]) == ("queued", None)
