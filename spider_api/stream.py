"""A job's events as server-sent events: first what was missed, then live, without a seam.

Each event goes out as a message ``id: {offset}-1`` with its JSON. Besides:

- ``event: reset``, with a status document without events: what the client asked for was trimmed
  (or the log began anew), and events go on from ``events_start_offset``;
- ``event: end``, with the job's final status document, after which the stream closes;
- a comment after each silence of ``heartbeat`` seconds, so that proxies keep the connection and
  the client knows that it is there.
"""

from __future__ import annotations

__all__ = ["EventStream", "parse_event_id"]

import logging
import re
from collections.abc import Iterator
from typing import Final

import orjson

from spider_api.documents import brief_document
from spider_api.metrics import Metrics
from spider_sdk.errors import FleetUnavailable, JobNotFound
from spider_sdk.jobs import TERMINAL, StatusDocument
from spider_worker.fleet import Fleet
from spider_worker.fleet.live import RESYNC, LiveReader, Subscription, SubscriptionClosed

logger = logging.getLogger(__name__)

#: Comes before anything else, so that the client has its headers at once. EventSource waits
#: so many milliseconds before it connects again.
PROLOGUE: Final = b"retry: 1000\n: following\n\n"
HEARTBEAT: Final = b": heartbeat\n\n"
PAGE: Final = 500
_ENDS: Final = frozenset(f"job.{status.value}" for status in TERMINAL)
_EVENT_ID: Final = re.compile(r"(\d{1,15})-\d{1,15}|(\d{1,15})")


def parse_event_id(text: str) -> int | None:
    """The offset after the event of that id; None if it is no id of ours."""
    found = _EVENT_ID.fullmatch(text.strip())
    return int(found.group(1) or found.group(2)) + 1 if found else None


class EventStream:
    """The events of one job from offset ``since`` on, as bytes. Iterate once.

    Live events are subscribed to before the stream is read, so nothing falls between; an event
    that comes twice is told by its offset, and so is one that did not come.
    """

    def __init__(
        self,
        fleet: Fleet,
        live: LiveReader,
        metrics: Metrics,
        job_id: str,
        *,
        since: int,
        heartbeat: float,
    ) -> None:
        self._fleet = fleet
        self._live = live
        self._metrics = metrics
        self._job_id = job_id
        self._next = since
        self._heartbeat = heartbeat

    def __iter__(self) -> Iterator[bytes]:
        self._metrics.clients.inc()
        try:
            yield PROLOGUE
            with self._live.subscribe(self._job_id) as subscription:
                yield from self._follow(subscription)
        except SubscriptionClosed:
            return  # the client comes back, with the id of the last event that it got
        except (FleetUnavailable, JobNotFound) as error:
            logger.warning("a stream of job %s ends: %s", self._job_id, error)
        finally:
            self._metrics.clients.dec()

    def _follow(self, subscription: Subscription) -> Iterator[bytes]:
        try:
            yield from self._replay()
            while not (ended := self._ended()):
                yield from self._until_end(subscription)
            yield _message(b"end", ended, self._next - 1)
        finally:
            if subscription.dropped:
                self._metrics.dropped.inc()

    def _until_end(self, subscription: Subscription) -> Iterator[bytes]:
        """Live events, up to one that says that the job has ended."""
        while True:
            event = subscription.get(self._heartbeat)
            if event is None:
                yield HEARTBEAT
            if event is None or event is RESYNC or event.offset > self._next:
                yield from self._replay()
                # Nothing more may be published: then the end is not heard but looked up.
                if self._ended():
                    return
            elif event.offset == self._next:
                yield self._event(event.offset, event.payload)
                if event.code in _ENDS:
                    return

    def _replay(self) -> Iterator[bytes]:
        """Everything that the job's stream holds from here on."""
        while True:
            page = self._fleet.events.read(self._job_id, self._next, PAGE)
            if page.truncated or (not page.events and self._begun_anew()):
                self._next = page.start_offset
                record = self._fleet.jobs.get(self._job_id)
                document = brief_document(
                    record, next_offset=self._next, start_offset=page.start_offset
                )
                yield _message(b"reset", document, self._next - 1)
                if not page.truncated:
                    continue
            for event in page.events:
                yield self._event(event.offset, orjson.dumps(event.to_json()))
            if len(page.events) < PAGE:
                return

    def _begun_anew(self) -> bool:
        """Does the client know events that this log never had (a fleet that was rebuilt)?"""
        return self._next > self._fleet.jobs.get(self._job_id).next_offset

    def _ended(self) -> StatusDocument | None:
        """The final document, if the job has ended and every event of it was sent."""
        record = self._fleet.jobs.get(self._job_id)
        if record.status not in TERMINAL or record.next_offset > self._next:
            return None
        return brief_document(record, next_offset=self._next)

    def _event(self, offset: int, payload: bytes) -> bytes:
        self._next = offset + 1
        self._metrics.events.inc()
        return b"id: %d-1\ndata: %b\n\n" % (offset, payload)


def _message(event: bytes, document: StatusDocument, last: int) -> bytes:
    """A named message. ``last`` below 0 clears the client's id: it knows no event yet."""
    identity = b"id: %d-1\n" % last if last >= 0 else b"id:\n"
    return b"event: %b\n%bdata: %b\n\n" % (event, identity, orjson.dumps(document))
