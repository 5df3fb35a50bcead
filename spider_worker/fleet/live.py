"""Live events: one pub/sub reader a process, fanned out to everybody who follows a job.

Pub/sub promises nothing: a message published while the reader is away is gone. So a subscriber
never relies on it alone. It is told ``RESYNC`` after each (re)connection and then reads the
job's stream from where it is; and since offsets have no gaps, it can see one by itself.
"""

from __future__ import annotations

__all__ = ["RESYNC", "LiveEvent", "LiveReader", "Resync", "Subscription", "SubscriptionClosed"]

import collections
import contextlib
import dataclasses
import enum
import json
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from spider_sdk.errors import SpiderError
from spider_worker.fleet.names import live_channel

logger = logging.getLogger(__name__)

#: Seconds without traffic after which the connection is tried with a PING, and after twice
#: of which it counts as dead.
PING_AFTER: Final = 5.0
#: Pauses between attempts to connect, in seconds; the last one repeats.
PAUSES: Final = (0.05, 0.1, 0.25, 0.5, 1.0)
#: Events that may wait for one slow client before it is dropped.
BACKLOG: Final = 1000


class Resync(enum.Enum):
    RESYNC = enum.auto()


RESYNC: Final = Resync.RESYNC
"""Events may have been missed: read the job's stream."""


class SubscriptionClosed(SpiderError):
    """No more live events come here: the reader stops, or this subscriber was too slow."""


@dataclasses.dataclass(frozen=True, slots=True)
class LiveEvent:
    """An event as it was published; ``payload`` is its JSON, encoded once for all clients."""

    offset: int
    code: str
    payload: bytes


class Subscription:
    """What one follower of one job still has to read. Made by ``LiveReader.subscribe``."""

    def __init__(self, backlog: int) -> None:
        self._backlog = backlog
        self._events: collections.deque[LiveEvent] = collections.deque()
        self._resync = False
        self._change = threading.Condition(threading.Lock())
        self.closed = False
        self.dropped = False  #: closed because the backlog was full

    def get(self, timeout: float) -> LiveEvent | Resync | None:
        """The next event, or RESYNC; None after ``timeout`` seconds of silence.

        Raises SubscriptionClosed at once when closed, whatever is still waiting: the follower
        comes back and reads that from the stream.
        """
        with self._change:
            self._change.wait_for(
                lambda: self.closed or self._resync or bool(self._events), timeout
            )
            if self.closed:
                raise SubscriptionClosed
            if self._resync:
                self._resync = False
                return RESYNC
            return self._events.popleft() if self._events else None

    def _push(self, event: LiveEvent) -> None:
        with self._change:
            if len(self._events) >= self._backlog:
                self.closed = self.dropped = True
                self._events.clear()
            elif not self.closed:
                self._events.append(event)
            self._change.notify()

    def _ask_resync(self) -> None:
        with self._change:
            self._resync = True
            self._change.notify()

    def _close(self) -> None:
        with self._change:
            self.closed = True
            self._change.notify()


class LiveReader:
    """Reads the events of every job over one connection; started by its first subscriber.

    The thread is a greenlet where gevent has patched ``threading``. Nothing here raises
    FleetUnavailable: while Redis is away subscribers hear nothing, and RESYNC once it is back.
    """

    def __init__(self, redis_url: str, *, backlog: int = BACKLOG) -> None:
        self._url = redis_url
        self._backlog = backlog
        self._lock = threading.Lock()
        self._followers: dict[bytes, set[Subscription]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def subscribe(self, job_id: str) -> Iterator[Subscription]:
        """Follow a job inside the block. Subscribe first and read the stream then: what is
        published in between waits in the subscription."""
        subscription = Subscription(self._backlog)
        channel = live_channel(job_id).encode()
        with self._lock:
            if self._stop.is_set():
                subscription.closed = True
            else:
                self._followers.setdefault(channel, set()).add(subscription)
                self._start()
        try:
            yield subscription
        finally:
            with self._lock:
                followers = self._followers.get(channel, set())
                followers.discard(subscription)
                if not followers:
                    self._followers.pop(channel, None)

    def close(self) -> None:
        """End every subscription, now and from now on. Safe to call twice, and from a signal's
        greenlet: it waits for nothing."""
        self._stop.set()
        for subscription in self._all():
            subscription._close()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="live-events", daemon=True)
            self._thread.start()

    def _all(self) -> list[Subscription]:
        return [item for group in list(self._followers.values()) for item in list(group)]

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            client = self._connect()
            try:
                with client.pubsub() as pubsub:
                    pubsub.psubscribe(live_channel("*"))
                    for message in self._messages(pubsub):
                        failures = 0
                        self._dispatch(message)
            except redis.exceptions.RedisError as error:
                if failures == 0:
                    logger.warning("live events wait for Redis: %s", error)
                failures += 1
            finally:
                client.close()
            self._stop.wait(PAUSES[min(failures, len(PAUSES)) - 1])

    def _connect(self) -> Any:
        # No retries inside redis-py: it would reconnect and subscribe again without a word,
        # and nobody would know that something was missed.
        return redis.Redis.from_url(
            self._url,
            socket_timeout=PING_AFTER,
            socket_connect_timeout=PING_AFTER,
            socket_keepalive=True,
            health_check_interval=0,
            retry=Retry(NoBackoff(), 0),
        )

    def _messages(self, pubsub: Any) -> Iterator[dict[str, Any]]:
        heard = time.monotonic()
        while not self._stop.is_set():
            message = pubsub.get_message(timeout=PING_AFTER)
            if message is not None:
                heard = time.monotonic()
                yield message
            elif time.monotonic() - heard > 2 * PING_AFTER:
                raise redis.exceptions.ConnectionError("Redis has fallen silent")
            else:
                pubsub.ping()

    def _dispatch(self, message: dict[str, Any]) -> None:
        if message["type"] == "psubscribe":
            # Subscribed from here on; what was published before is for the stream to tell.
            for subscription in self._all():
                subscription._ask_resync()
        elif message["type"] == "pmessage":
            followers = self._followers.get(message["channel"])
            if followers:
                document = json.loads(message["data"])
                event = LiveEvent(int(document["offset"]), document["code"], message["data"])
                for subscription in list(followers):
                    subscription._push(event)
