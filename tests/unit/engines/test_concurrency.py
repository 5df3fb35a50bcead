"""The limit on requests in flight: growth, cuts, episodes, order, cancellation."""

from __future__ import annotations

import asyncio

from spider_worker.engines.concurrency import AdaptiveLimit


async def _window(limit: AdaptiveLimit, *, good: int, refused: int, latency: float = 0.1) -> None:
    """One outcome after another; what is asked is only what the limit learns."""
    for number in range(good + refused):
        epoch = await limit.acquire()
        if number < good:
            limit.succeeded(epoch, latency)
        else:
            limit.throttled(epoch, None)
        limit.release()


def test_grows_to_the_bound_while_all_is_well() -> None:
    limit = AdaptiveLimit(512)
    assert limit.limit < 512
    asyncio.run(_window(limit, good=400, refused=0))
    assert limit.limit == 512


def test_never_above_the_bound() -> None:
    limit = AdaptiveLimit(5)
    asyncio.run(_window(limit, good=500, refused=0))
    assert limit.limit == 5


def test_scattered_refusals_cut_nothing() -> None:
    limit = AdaptiveLimit(100, start=100)

    async def go() -> None:
        for _ in range(20):
            await _window(limit, good=95, refused=5)

    asyncio.run(go())
    assert limit.cuts == 0
    assert limit.limit == 100


def test_one_episode_makes_one_cut() -> None:
    """A hundred requests sent under the same limit are refused: that is one thing said."""
    limit = AdaptiveLimit(100, start=100)

    async def go() -> None:
        epochs = [await limit.acquire() for _ in range(100)]
        for epoch in epochs:
            limit.throttled(epoch, None)
            limit.release()

    asyncio.run(go())
    assert limit.cuts == 1
    assert limit.limit == 50


def test_after_a_cut_it_grows_again_and_slowly() -> None:
    limit = AdaptiveLimit(100, start=100)

    async def go() -> None:
        await _window(limit, good=0, refused=21)  # just above a fifth
        cut = limit.limit
        await _window(limit, good=cut, refused=0)
        assert cut < limit.limit <= cut + 1 + cut // 16
        await _window(limit, good=3000, refused=0)

    asyncio.run(go())
    assert limit.limit == 100


def test_a_limit_of_one_is_never_cut_to_none() -> None:
    limit = AdaptiveLimit(100, start=4)

    async def go() -> None:
        for _ in range(20):
            await _window(limit, good=0, refused=16)

    asyncio.run(go())
    assert limit.limit == 1


def test_growth_stops_when_answers_become_slow() -> None:
    limit = AdaptiveLimit(10_000, start=32)

    async def go() -> int:
        await _window(limit, good=64, refused=0, latency=0.1)
        for _ in range(10):
            await _window(limit, good=limit.limit, refused=0, latency=0.5)
        return limit.limit

    settled = asyncio.run(go())
    assert settled < 1000
    assert limit.cuts == 0


def test_a_pause_holds_new_requests_for_as_long_as_asked() -> None:
    async def go() -> tuple[float, int]:
        limit = AdaptiveLimit(20, start=20)
        epochs = [await limit.acquire() for _ in range(20)]
        for epoch in epochs:
            limit.throttled(epoch, 0.05)
            limit.release()
        loop = asyncio.get_running_loop()
        began = loop.time()
        await limit.acquire()
        return loop.time() - began, limit.in_flight

    waited, in_flight = asyncio.run(go())
    assert waited >= 0.04
    assert in_flight == 1


def test_retries_go_ahead_of_those_that_wait() -> None:
    async def go() -> list[str]:
        limit = AdaptiveLimit(1)
        order: list[str] = []

        async def one(name: str, first: bool) -> None:
            await limit.acquire(first=first)
            order.append(name)
            limit.release()

        await limit.acquire()
        tasks = [asyncio.ensure_future(one(name, False)) for name in ("a", "b")]
        await asyncio.sleep(0)
        tasks.append(asyncio.ensure_future(one("retry", True)))
        await asyncio.sleep(0)
        limit.release()
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(go()) == ["retry", "a", "b"]


def test_a_cancelled_waiter_loses_no_place() -> None:
    async def go() -> int:
        limit = AdaptiveLimit(1)
        await limit.acquire()
        waiting = asyncio.ensure_future(limit.acquire())
        granted = asyncio.ensure_future(limit.acquire())
        await asyncio.sleep(0)
        limit.release()  # grants `waiting`, which is cancelled before it runs
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await granted
        return limit.in_flight

    assert asyncio.run(go()) == 1
