"""The pub/sub reader on a real Redis: fan-out, slow readers, cut connections."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from spider_sdk.jobs import Queue
from spider_worker.fleet import Fleet
from spider_worker.fleet.live import (
    RESYNC,
    LiveEvent,
    LiveReader,
    Subscription,
    SubscriptionClosed,
)
from tests.support.redis_server import RedisServer

JOB = {"model": {"provider": "openai", "name": "m"}, "source": {"dataset": "d"}}


@pytest.fixture
def reader(redis_server: RedisServer) -> Iterator[LiveReader]:
    reader = LiveReader(redis_server.url, backlog=5)
    yield reader
    reader.close()


def submit(fleet: Fleet) -> str:
    return fleet.jobs.submit("me", JOB, {}, queue=Queue.OFFLINE_GEN).job_id


def until_connected(subscription: Subscription) -> None:
    assert subscription.get(10) is RESYNC


def test_every_follower_of_a_job_hears_it_and_no_other(fleet: Fleet, reader: LiveReader) -> None:
    job, other = submit(fleet), submit(fleet)
    with (
        reader.subscribe(job) as one,
        reader.subscribe(job) as two,
        reader.subscribe(other) as three,
    ):
        for subscription in (one, two, three):
            until_connected(subscription)
        fleet.events.append(job, "info", "note", "hello")
        for subscription in (one, two):
            event = subscription.get(10)
            assert isinstance(event, LiveEvent)
            assert (event.offset, event.code) == (1, "note")
        assert three.get(0.2) is None


def test_a_slow_follower_is_dropped_and_the_others_are_not(
    fleet: Fleet, reader: LiveReader
) -> None:
    job = submit(fleet)
    with reader.subscribe(job) as slow, reader.subscribe(job) as quick:
        until_connected(slow)
        until_connected(quick)
        for number in range(7):
            fleet.events.append(job, "info", "note", str(number))
            event = quick.get(10)
            assert isinstance(event, LiveEvent)
            assert event.offset == number + 1
        with pytest.raises(SubscriptionClosed):
            slow.get(10)
        assert slow.dropped
        assert not quick.dropped


def test_a_cut_connection_is_told(fleet: Fleet, reader: LiveReader) -> None:
    job = submit(fleet)
    with reader.subscribe(job) as subscription:
        until_connected(subscription)
        fleet.redis.client_kill_filter(_type="pubsub")
        assert subscription.get(10) is RESYNC
        fleet.events.append(job, "info", "note", "after")
        assert isinstance(subscription.get(10), LiveEvent)


def test_a_restart_of_redis_is_told(
    redis_server: RedisServer, fleet: Fleet, reader: LiveReader
) -> None:
    job = submit(fleet)
    with reader.subscribe(job) as subscription:
        until_connected(subscription)
        redis_server.stop(signal.SIGKILL)
        redis_server.start()
        assert subscription.get(10) is RESYNC
        fleet.events.append(job, "info", "note", "after")
        deadline = time.monotonic() + 10
        while not isinstance(subscription.get(1), LiveEvent):
            assert time.monotonic() < deadline


def test_closing_ends_every_subscription(fleet: Fleet, reader: LiveReader) -> None:
    job = submit(fleet)
    with reader.subscribe(job) as subscription:
        until_connected(subscription)
        reader.close()
        with pytest.raises(SubscriptionClosed):
            subscription.get(10)
    with reader.subscribe(job) as late, pytest.raises(SubscriptionClosed):
        late.get(10)
