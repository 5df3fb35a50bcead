"""What a runner keeps between units (of one job), and engines between jobs."""

from __future__ import annotations

__all__ = ["ResourceCache"]

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


class ResourceCache:
    """Built once per key, however many ask at the same time; closed in reverse order."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[asyncio.Task[Any], Callable[[Any], Awaitable[None]], bool]]
        self._entries = {}

    async def get(
        self,
        key: str,
        build: Callable[[], Awaitable[T]],
        close: Callable[[T], Awaitable[None]],
        *,
        outlives_job: bool = False,
    ) -> T:
        """See ``spider_worker.pipelines.base.Resources``."""
        if key not in self._entries:
            task: asyncio.Task[T] = asyncio.ensure_future(build())
            self._entries[key] = (task, close, outlives_job)
        task = self._entries[key][0]
        try:
            # Shielded: a cancelled unit must not take the engine from its neighbours.
            return await asyncio.shield(task)
        except BaseException:
            if task.done() and (task.cancelled() or task.exception() is not None):
                self._entries.pop(key, None)  # the next attempt builds it anew
            raise

    async def close(self, *, job_only: bool) -> None:
        """Close what belongs to the job, or everything."""
        for key, (task, close, outlives) in reversed(list(self._entries.items())):
            if job_only and outlives:
                continue
            del self._entries[key]
            if not task.done():
                task.cancel()
            try:
                value = await task
            except asyncio.CancelledError:
                continue
            except Exception as error:  # noqa: BLE001 (whoever asked for it was told already)
                logger.debug("%s was never built: %s", key, error)
                continue
            try:
                await close(value)
            except Exception:  # boundary: one resource must not keep the others open
                logger.exception("closing %s failed", key)
