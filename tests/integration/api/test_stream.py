"""Server-sent events from the app: replay, live, reset and end, without a gap or a repeat."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from spider_api.stream import parse_event_id
from spider_worker.fleet import Fleet
from spider_worker.fleet.live import LiveReader
from spider_worker.fleet.names import job_key
from tests.support.hand_run import HandRun, record


@dataclasses.dataclass
class Message:
    event: str
    id: str | None
    data: Any


def messages(answer: Any) -> Iterator[Message]:
    """The messages of a streamed answer, as they come; comments are left out."""
    text = ""
    for chunk in answer.iter_encoded():
        text += chunk.decode()
        *whole, text = text.split("\n\n")
        for block in whole:
            fields = dict(line.split(":", 1) for line in block.split("\n") if line[0] != ":")
            if "data" in fields:
                identity = fields["id"].strip() if "id" in fields else None
                data = json.loads(fields["data"])
                yield Message(fields.get("event", "message").strip(), identity, data)


def follow(user: Any, job: str, since: int | None = None, last: str | None = None) -> Any:
    headers = {} if last is None else {"Last-Event-ID": last}
    query = "" if since is None else f"?since={since}"
    return user.get(f"/v1/jobs/{job}/events{query}", headers=headers, buffered=False)


def note(fleet: Fleet, job: str, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        fleet.events.append(job, "info", "note", str(number))


def test_headers_keep_proxies_from_holding_events_back(ada: Any) -> None:
    answer = follow(ada, ada.submit())
    assert answer.status_code == 200
    assert answer.content_type.startswith("text/event-stream")
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert answer.headers["Cache-Control"] == "no-cache"
    answer.close()


def test_an_ended_job_is_replayed_and_the_stream_closes(ada: Any, fleet: Fleet) -> None:
    job = ada.submit()
    run = HandRun(fleet, job, units=1)
    run.work(record(0))
    run.finish()
    got = list(messages(follow(ada, job)))
    *events, end = got
    assert [message.data["offset"] for message in events] == list(range(len(events)))
    assert [message.id for message in events] == [f"{n}-1" for n in range(len(events))]
    assert events[-1].data["code"] == "job.completed"
    assert end.event == "end"
    assert end.data["status"] == "completed"
    assert end.data["metrics"]["rows_done"] == 1
    assert end.data.keys() == ada.get(f"/v1/jobs/{job}").json.keys()


@pytest.mark.parametrize(
    ("since", "last", "first"),
    [(None, None, 0), (3, None, 3), (None, "2-1", 3), (1, "4-1", 5), (2, "garbage", 2)],
)
def test_a_stream_goes_on_where_it_is_told_to(
    ada: Any, fleet: Fleet, since: int | None, last: str | None, first: int
) -> None:
    job = ada.submit()
    note(fleet, job, 6)
    ada.post(f"/v1/jobs/{job}/cancel")
    offsets = [
        m.data["offset"] for m in messages(follow(ada, job, since, last)) if m.event == "message"
    ]
    assert offsets == list(range(first, 8))


def test_a_follower_of_an_ended_job_that_has_seen_all_gets_the_end_alone(
    ada: Any, fleet: Fleet
) -> None:
    job = ada.submit()
    ada.post(f"/v1/jobs/{job}/cancel")
    assert [m.event for m in messages(follow(ada, job, since=2))] == ["end"]


def test_live_events_follow_what_was_missed_without_a_seam(ada: Any, fleet: Fleet) -> None:
    """Somebody writes all the time while followers come and go."""
    job = ada.submit()
    total = 400
    writer = threading.Thread(target=note, args=(fleet, job, total))
    writer.start()
    seen: list[int] = []
    last: str | None = None
    ended = False
    while not ended:
        answer = follow(ada, job, last=last)
        for count, message in enumerate(messages(answer)):
            if message.event == "end":
                ended = True
                break
            seen.append(message.data["offset"])
            last = message.id
            if len(seen) == total + 1:
                ada.post(f"/v1/jobs/{job}/cancel")
            if count == 60:
                break  # cut it, and come back
        answer.close()
    writer.join()
    assert seen == list(range(total + 2))


def test_what_pubsub_loses_is_read_from_the_log(
    ada: Any, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other live message vanishes; the offsets tell."""
    job = ada.submit()
    deliver = LiveReader._dispatch
    kinds = itertools.cycle((False, True))

    def lossy(self: LiveReader, message: dict[str, Any]) -> None:
        if message["type"] != "pmessage" or next(kinds):
            deliver(self, message)

    monkeypatch.setattr(LiveReader, "_dispatch", lossy)
    seen = []
    for message in messages(follow(ada, job)):
        if message.event == "end":
            break
        seen.append(message.data["offset"])
        if len(seen) == 1:
            note(fleet, job, 20)  # offsets 1 to 20
            ada.post(f"/v1/jobs/{job}/cancel")  # 21, which is lost too and found after a silence
    assert seen == list(range(22))


def test_silence_is_broken_by_comments(ada: Any) -> None:
    answer = follow(ada, ada.submit())
    text = b""
    for chunk in answer.iter_encoded():  # the settings of these tests beat every 0.2 s
        text += chunk
        if text.count(b": heartbeat\n\n") == 2:
            break
    answer.close()
    assert b"job.queued" in text


def test_trimmed_events_give_a_reset_with_a_snapshot(ada: Any, fleet: Fleet) -> None:
    job = ada.submit()
    note(fleet, job, 20)
    fleet.redis.xtrim(job_key(job, "events"), minid="10-1", approximate=False)
    ada.post(f"/v1/jobs/{job}/cancel")
    first, *rest = messages(follow(ada, job, last="3-1"))
    assert first.event == "reset"
    assert first.id == "9-1"
    assert first.data["job_id"] == job
    assert first.data["events"] == []
    assert first.data["events_start_offset"] == 10
    assert [m.data["offset"] for m in rest[:-1]] == list(range(10, 22))
    assert rest[-1].event == "end"
    polled = ada.get(f"/v1/jobs/{job}?since=3").json
    assert polled["events_truncated"]
    assert polled["events_start_offset"] == 10


def test_a_log_that_began_anew_gives_a_reset(ada: Any, fleet: Fleet) -> None:
    job = ada.submit()
    ada.post(f"/v1/jobs/{job}/cancel")
    first, *rest = messages(follow(ada, job, last="500-1"))
    assert first.event == "reset"
    assert first.data["events_start_offset"] == 0
    assert [m.event for m in rest] == ["message", "message", "end"]


def test_a_retried_job_is_followed_past_its_first_end(ada: Any, fleet: Fleet) -> None:
    job = ada.submit()
    ada.post(f"/v1/jobs/{job}/cancel")
    ada.post(f"/v1/jobs/{job}/retry")
    answer = follow(ada, job)
    codes = []
    for message in messages(answer):
        codes.append(message.data.get("code", message.event))
        if len(codes) == 3:
            ada.post(f"/v1/jobs/{job}/cancel")
    assert codes == ["job.queued", "job.cancelled", "job.queued", "job.cancelled", "end"]


@pytest.mark.parametrize(
    ("text", "offset"),
    [("0-1", 1), ("41-1", 42), (" 7-1 ", 8), ("7", 8), ("", None), ("-1", None), ("1-", None),
     ("x", None), ("9" * 30, None)],
)  # fmt: skip
def test_event_ids(text: str, offset: int | None) -> None:
    assert parse_event_id(text) == offset
