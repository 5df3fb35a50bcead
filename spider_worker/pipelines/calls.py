"""Calls through the context that reach the fleet: off the event loop, patient in an outage."""

from __future__ import annotations

__all__ = ["Announcer", "announce", "persist"]

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from spider_sdk.config.model import Job
from spider_sdk.errors import FleetUnavailable, LeaseLost
from spider_worker.pipelines.base import JobContext

T = TypeVar("T")
log = logging.getLogger(__name__)

_PAUSE: Final = 0.2  # seconds


async def persist(call: Callable[[], T]) -> T:
    """Make a call on a thread, again while the fleet's record cannot be reached. Whoever holds
    the lease bounds how long: a runner that cannot renew it is ended. Raises LeaseLost."""
    while True:
        try:
            return await asyncio.to_thread(call)
        except FleetUnavailable as error:
            log.warning("waiting for the fleet: %s", error)
            await asyncio.sleep(_PAUSE)


async def announce(
    ctx: JobContext[Job], code: str, message: str, data: Mapping[str, Any] | None = None
) -> None:
    """Say what goes on to whoever follows the job. An event that cannot be sent is logged:
    whether the lease still holds shows where something is written."""
    try:
        await asyncio.to_thread(ctx.event, "info", code, message, data)
    except (FleetUnavailable, LeaseLost) as error:
        log.warning("an event was not sent (%s): %s", error, message)


class Announcer:
    """Sends events without anybody waiting for them; one that cannot be sent is logged."""

    def __init__(self, ctx: JobContext[Job]) -> None:
        self._ctx = ctx
        self._tasks: set[asyncio.Task[None]] = set()

    def say(self, level: str, code: str, message: str, data: Mapping[str, Any]) -> None:
        call = functools.partial(self._ctx.event, level, code, message, data)
        task = asyncio.create_task(self._send(call, message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self) -> None:
        """Wait for what is still on its way."""
        await asyncio.gather(*self._tasks)

    async def _send(self, call: Callable[[], None], message: str) -> None:
        try:
            await asyncio.to_thread(call)
        except (FleetUnavailable, LeaseLost) as error:
            log.warning("an event was not sent (%s): %s", error, message)
