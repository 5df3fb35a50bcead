"""Following a job: one stream of updates over SSE, over polling where there is no SSE.

``Follower`` owns every reconnection: it resumes after the last event that it handed on, so that
the caller sees each event once and in order however often the connection breaks. It ends when
the job has, which it takes from the server's status document alone: a terminal event may be
that of an attempt before a retry.
"""

from __future__ import annotations

__all__ = ["Follower", "JobView", "Update"]

import dataclasses
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from spider_sdk.errors import (
    ApiError,
    PollTimeout,
    ServerBusy,
    ServerUnreachable,
)
from spider_sdk.events import Event
from spider_sdk.jobs import TERMINAL, StatusDocument
from spider_sdk.sse import Message, read_messages
from spider_sdk.transport import Transport, job_path

_JITTER = random.SystemRandom()

SILENCE = 60.0
"""Seconds without a byte (heartbeats included) after which a stream counts as broken."""
RECHECK = 60.0
"""Seconds without an event after which the status is looked at, in case one was lost."""
BACKLOG = 100
"""So many events in one answer mean that more are waiting."""
NO_STREAM = frozenset({404, 405, 406, 501})
"""Answers that mean "no SSE here" (404 too: a job that is not there is told by its status)."""


@dataclasses.dataclass(frozen=True)
class Update:
    """Either an ``event`` or a whole ``document`` that the server sent (one is None).

    Both are None where a server with nothing to tell says that it is there: time for what should
    not wait for the job's next event. ``final`` marks the last update: its document is the job's
    final one.
    """

    event: Event | None = None
    document: StatusDocument | None = None
    final: bool = False

    @property
    def quiet(self) -> bool:
        return self.event is None and self.document is None


class Follower:
    """The updates of one job, from the event with offset ``since`` on.

    ``interval`` seconds between polls; ``deadline`` on ``clock`` after which PollTimeout is
    raised (None: never); ``stream`` False polls from the start; ``give_up_after`` seconds
    without any contact raise ServerUnreachable.
    """

    def __init__(
        self,
        transport: Transport,
        job_id: str,
        *,
        since: int = 0,
        interval: float = 5.0,
        deadline: float | None = None,
        stream: bool = True,
        give_up_after: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.next = since
        self._transport = transport
        self._job_id = job_id
        self._interval = interval
        self._deadline = deadline
        self._streaming = stream
        self._give_up_after = give_up_after
        self._clock = clock
        self._sleep = sleep
        self._contact = clock()
        self._failures = 0
        self._mute = 0

    def __iter__(self) -> Iterator[Update]:
        """Raises PollTimeout, ServerUnreachable, NotFound and other ApiErrors."""
        while True:
            polled = not self._streaming
            try:
                for update in self._poll() if polled else self._stream():
                    self._reached()
                    yield update
                    if update.final:
                        return
            except (ServerUnreachable, ServerBusy) as error:
                self._back_off(error)
                continue
            if polled:
                self._wait(self._interval)

    def status(self) -> StatusDocument:
        """The job as it stands, with the events from ``next`` on."""
        document = self._transport.json(
            "GET",
            job_path(self._job_id),
            params={"since": self.next},
            retry=False,
            timeout=self._patience(),
        )
        return cast(StatusDocument, document)

    # One connection: until it ends, is cut, or the job is over.

    def _stream(self) -> Iterator[Update]:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
        if self.next:
            headers["Last-Event-ID"] = f"{self.next - 1}-1"
        connected = received = False
        try:
            with self._transport.stream(
                job_path(self._job_id, "events"),
                headers=headers,
                read_timeout=self._patience(),
            ) as response:
                connected = True
                kind = response.headers.get("content-type", "").partition(";")[0].strip()
                if kind != "text/event-stream":
                    self._streaming = False
                    return
                quiet_since = self._clock()
                for message in read_messages(response.iter_bytes()):
                    received = True
                    self._mute = 0
                    self._check_deadline()
                    if message is not None:
                        quiet_since = self._clock()
                        yield from self._message(message)
                    elif self._clock() - quiet_since > RECHECK:
                        quiet_since = self._clock()
                        yield from self._ended()
                    if message is None:
                        yield Update()
                    self._reached()
        except ApiError as error:
            if error.status not in NO_STREAM:
                raise
            self._streaming = False
            return
        except ServerUnreachable:
            self._check_deadline()
            # A proxy that holds the stream back gives not a byte, not even a heartbeat.
            self._mute += 1 if connected and not received else 0
            if self._mute >= 2:
                self._streaming = False
            raise
        # The server closed the stream: because the job is over, or to have us come back.
        yield from self._ended()
        self._wait(min(self._interval, 0.2 if received else 1.0))

    def _message(self, message: Message) -> Iterator[Update]:
        document = _json(message)
        if message.event == "message":
            event = _event(document)
            if event.offset < self.next:
                return
            self.next = event.offset + 1
            yield Update(event=event)
            if _is_terminal(event):
                yield from self._ended()
        elif message.event == "reset":
            yield from self._reset(cast(StatusDocument, document))
        elif message.event == "end":
            yield from self._document(cast(StatusDocument, document), final=True)

    def _reset(self, document: StatusDocument) -> Iterator[Update]:
        """Events after ours were trimmed, or the log began anew: take the snapshot."""
        start = int(document["events_start_offset"])
        if int(document["events_next_offset"]) < self.next:
            self.next = start
        yield from self._document(document, final=False)
        self.next = max(self.next, start)

    def _ended(self) -> Iterator[Update]:
        """What is left, if the job has ended; nothing while it lives."""
        document = self.status()
        self._reached()
        while document["status"] in TERMINAL:
            before = self.next
            yield from self._document(document, final=False)
            if self.next == before:
                yield Update(document=document, final=True)
                return
            document = self.status()

    # One poll, and more at once while a backlog or the rest of an ended job is there to fetch.

    def _poll(self) -> Iterator[Update]:
        while True:
            self._check_deadline()
            document = self.status()
            ended, count = document["status"] in TERMINAL, len(document["events"])
            yield from self._document(document, final=False)
            if not count:
                self.next = max(self.next, int(document["events_next_offset"]))
                if ended:
                    yield Update(document=document, final=True)
            if (not ended and count < BACKLOG) or not count:
                return

    def _document(self, document: StatusDocument, *, final: bool) -> Iterator[Update]:
        for raw in document["events"]:
            event = _event(raw)
            if event.offset >= self.next:
                self.next = event.offset + 1
                yield Update(event=event)
        yield Update(document=document, final=final)

    # Time.

    def _patience(self) -> float:
        if self._deadline is None:
            return SILENCE
        return max(0.1, min(SILENCE, self._deadline - self._clock()))

    def _check_deadline(self) -> None:
        if self._deadline is not None and self._clock() >= self._deadline:
            raise PollTimeout(
                f"job {self._job_id} had not ended when the time for following it ran out; it "
                "goes on"
            )

    def _reached(self) -> None:
        self._contact = self._clock()
        self._failures = 0

    def _back_off(self, error: ServerUnreachable | ServerBusy) -> None:
        self._check_deadline()
        away = self._clock() - self._contact
        if away >= self._give_up_after:
            raise error
        self._failures += 1
        self._wait(min(10.0, 0.25 * 2.0 ** min(self._failures, 6)) * _JITTER.uniform(0.5, 1.0))

    def _wait(self, seconds: float) -> None:
        self._check_deadline()
        if self._deadline is not None:
            seconds = min(seconds, max(0.0, self._deadline - self._clock()))
        self._sleep(seconds)
        self._check_deadline()


class JobView:
    """A status document kept up to date by events, for those who follow a job."""

    def __init__(self, document: StatusDocument) -> None:
        self.document = document

    def apply(self, update: Update) -> StatusDocument:
        """The document after ``update``; its ``events`` holds the update's event alone, and
        none for a snapshot, whose events were updates before it, and for a quiet update."""
        if update.document is not None:
            self.document = cast(StatusDocument, {**update.document, "events": []})
            return self.document
        event = update.event
        if event is None:
            self.document = cast(StatusDocument, {**self.document, "events": []})
            return self.document
        changes: dict[str, Any] = {
            "updated_at": event.timestamp,
            "events": [event.to_json()],
            "events_next_offset": event.offset + 1,
        }
        noun, _, word = event.code.partition(".")
        if noun == "job" and word in (*TERMINAL, "queued", "running"):
            changes["status"] = word
            if word == "queued":
                changes["error"] = None  # a retry
        if isinstance(event.data.get("metrics"), dict):
            changes["metrics"] = {**self.document["metrics"], **event.data["metrics"]}
        if isinstance(event.data.get("error"), str) and word == "failed":
            changes["error"] = event.data["error"]
        self.document = cast(StatusDocument, {**self.document, **changes})
        return self.document


def _event(document: Mapping[str, Any]) -> Event:
    try:
        return Event.from_json(document)
    except (KeyError, TypeError, ValueError) as error:
        raise ApiError(f"the server sent an event of another shape: {error!r}") from error


def _is_terminal(event: Event) -> bool:
    noun, _, word = event.code.partition(".")
    return noun == "job" and word in TERMINAL


def _json(message: Message) -> dict[str, Any]:
    try:
        document = json.loads(message.data)
    except ValueError as error:
        raise ApiError(f"the event stream sent something other than JSON: {error}") from error
    if not isinstance(document, dict):
        raise ApiError("the event stream sent an event that is no object")
    return document
