"""How many requests may be in flight: a limit that learns what an endpoint bears.

The limit starts low enough to be polite, grows fast while nothing speaks against it,
and is cut when refusals (429) become a matter of load. A few scattered 429s are not: they
cost a retry each and no throughput, so a cut needs a fifth of a window's outcomes. A cut
opens a new *epoch*; what was sent in an older one says nothing about the new limit and is
ignored, so that one episode of congestion makes one cut however many requests it hits.
"""

from __future__ import annotations

__all__ = ["AdaptiveLimit"]

import asyncio
import collections
from typing import Final

_START: Final = 128  # requests in flight at first
_RAMP: Final = 3  # added per success until the first sign of saturation
_CUT_ABOVE: Final = 0.2  # share of 429 in a window that means congestion
_GROW_BELOW: Final = 0.1  # share of 429 that still allows growth
_SATURATED: Final = 2.0  # latency over the best seen at which growth stops
_MIN_WINDOW: Final = 16  # outcomes; fewer say nothing


class AdaptiveLimit:
    """A semaphore of one event loop whose size is ``limit``, at most ``bound``.

    Use: ``epoch = await acquire()``, send, then exactly one of ``succeeded``,
    ``throttled`` or ``failed``, and ``release()``.
    """

    def __init__(self, bound: int, *, start: int = _START) -> None:
        self.bound = bound
        self.limit = min(start, bound)
        self.in_flight = 0
        self.cuts = 0
        self._ramping = True
        self._paused_until = 0.0
        self._resume: asyncio.TimerHandle | None = None
        self._waiters: collections.deque[asyncio.Future[None]] = collections.deque()
        self._epoch = 0
        self._best_latency: float | None = None
        self._new_window()

    async def acquire(self, *, first: bool = False) -> int:
        """Wait for a place and return the epoch it belongs to. ``first`` goes ahead of
        those that wait: a retry, so that no row is overtaken by all later ones."""
        if self.in_flight >= self.limit or self._resume is not None:
            waiter = asyncio.get_running_loop().create_future()
            if first:
                self._waiters.appendleft(waiter)
            else:
                self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self.release()  # the place was granted and nobody will use it
                raise
        else:
            self.in_flight += 1
        return self._epoch

    def release(self) -> None:
        self.in_flight -= 1
        self._wake()

    def succeeded(self, epoch: int, latency: float) -> None:
        """A request of ``epoch`` was answered after ``latency`` seconds."""
        if epoch != self._epoch:
            return
        if self._ramping and self.limit < self.bound:
            self.limit = min(self.bound, self.limit + _RAMP)
            self._wake()
        self._latency_sum += latency
        self._latency_count += 1
        self._count()

    def failed(self, epoch: int) -> None:
        """An error that says nothing about load (a 500, a cut connection)."""
        if epoch == self._epoch:
            self._count()

    def throttled(self, epoch: int, retry_after: float | None) -> None:
        """The endpoint answered 429. In congestion nothing more is sent before
        ``retry_after`` seconds have passed (None: it did not say)."""
        if epoch != self._epoch:
            return
        self._throttled += 1
        if self._throttled > _CUT_ABOVE * self._window:
            self._cut(retry_after)
        else:
            self._count()

    def _count(self) -> None:
        self._outcomes += 1
        if self._outcomes >= self._window:
            self._close_window()

    def _close_window(self) -> None:
        share = self._throttled / self._outcomes
        stable = True
        if self._latency_count:
            latency = self._latency_sum / self._latency_count
            # The best is let rise slowly: answers may simply have become longer.
            best = (
                latency if self._best_latency is None else min(latency, self._best_latency * 1.05)
            )
            self._best_latency = best
            stable = latency <= _SATURATED * best
        if not stable:
            self._ramping = False
        elif share < _GROW_BELOW and not self._ramping:
            self.limit = min(self.bound, self.limit + 1 + self.limit // 16)
            self._wake()
        self._new_window()

    def _cut(self, retry_after: float | None) -> None:
        share = self._throttled / (self._outcomes + 1)
        self.limit = max(1, int(self.limit * max(0.5, 1 - share)))
        self.cuts += 1
        self._ramping = False
        self._epoch += 1
        self._new_window()
        if retry_after:
            loop = asyncio.get_running_loop()
            if self._resume is not None:
                self._resume.cancel()
            self._resume = loop.call_later(retry_after, self._go_on)

    def _new_window(self) -> None:
        # Fixed for its time: a window that grew with the limit would never close while ramping.
        self._window = max(self.limit, _MIN_WINDOW)
        self._outcomes = self._throttled = self._latency_count = 0
        self._latency_sum = 0.0

    def _go_on(self) -> None:
        self._resume = None
        self._wake()

    def _wake(self) -> None:
        if self._resume is not None:
            return
        while self._waiters and self.in_flight < self.limit:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self.in_flight += 1
                waiter.set_result(None)
