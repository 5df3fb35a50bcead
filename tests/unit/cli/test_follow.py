"""What a job that is followed tells whoever else wants to know."""

from __future__ import annotations

from spider_sdk import Client
from spider_sdk.cli.follow import follow
from spider_sdk.cli.state import State
from spider_sdk.events import Event
from spider_sdk.jobs import StatusDocument
from tests.support.scripted_server import (
    ScriptedServer,
    event,
    event_stream,
    frame,
    job_status,
    named_frame,
    status_document,
)

LOG = [event(0, "job.running"), event(1, "unit.committed"), event(2, "job.completed")]


class Heard:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def update(self, document: StatusDocument, event: Event | None) -> None:
        self.calls.append(event.code if event is not None else document["status"])

    def rest(self) -> None:
        self.calls.append("rest")

    def lines(self) -> list[str]:
        return []


def test_a_watcher_hears_of_events_and_of_the_quiet_between_them(server: ScriptedServer) -> None:
    end = named_frame("end", status_document("completed", LOG))
    frames = [frame(LOG[0]), frame(LOG[1]), b": beat\n\n", frame(LOG[2]), end]
    server.on("GET", "/v1/jobs/j1", job_status("running", []))
    server.on("GET", "/v1/jobs/j1/events", event_stream(frames, then="hold"))
    heard = Heard()
    with Client(base_url=server.url) as client:
        follow(client, State(), "j1", watcher=heard)
        assert not any(update.quiet for update in client.follow("j1"))
    assert heard.calls[:4] == ["job.running", "unit.committed", "rest", "job.completed"]
    assert heard.calls[-1] == "completed"
