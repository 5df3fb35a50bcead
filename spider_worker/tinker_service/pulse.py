"""Whether the service is still there. The SDK repeats what fails for ever, so that a run would
wait for a server that was killed; here its health is asked for while somebody waits."""

from __future__ import annotations

__all__ = ["Pulse"]

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Mapping
from typing import Any, Final, TypeVar

import httpx

from spider_sdk.errors import EngineUnavailable, SpiderError

T = TypeVar("T")

_PAUSE: Final = 10.0  # seconds between two questions, at most
_TRIES: Final = 3


class Pulse:
    """Of the service at ``base_url``, which is given up after ``patience`` seconds in which it did
    not answer once. ``name`` is what messages call it."""

    def __init__(
        self, base_url: str, headers: Mapping[str, str], *, name: str, patience: float
    ) -> None:
        self._url = f"{base_url}/api/v1/healthz"
        self._headers = dict(headers)
        self._name, self._patience = name, patience
        self._pause = min(_PAUSE, patience / 4)
        self._waiting: set[asyncio.Task[Any]] = set()
        self._monitor: asyncio.Task[None] | None = None
        self._lost: SpiderError | None = None

    async def check(self) -> None:
        """Raises EngineUnavailable where nothing answers, in a few tries."""
        said: str | None = None
        for number in range(_TRIES):
            if number:
                await asyncio.sleep(min(self._pause, float(number)))
            said = await self._ask()
            if said is None:
                return
        raise EngineUnavailable(
            f"{self._name} cannot be reached: {said}. Check base_url, and that the server runs"
        )

    async def answers(self) -> bool:
        """Whether the service is there, now."""
        return await self._ask() is None

    async def watch(self, call: Coroutine[Any, Any, T]) -> T:
        """What ``call`` returns or raises. Raises EngineUnavailable, and gives ``call`` up, when
        the service has been silent for too long."""
        task = asyncio.ensure_future(call)
        self._waiting.add(task)
        if len(self._waiting) == 1:
            self._lost = None
        if self._monitor is None or self._monitor.done():
            self._monitor = asyncio.create_task(self._listen())
        try:
            await asyncio.wait({task})
            if task.cancelled() and self._lost is not None:
                raise self._lost
            return task.result()
        finally:
            task.cancel()
            self._waiting.discard(task)
            if not self._waiting:
                self._monitor.cancel()

    def give_up(self, error: SpiderError) -> None:
        """Whoever waits gets ``error``."""
        self._lost = error
        for task in self._waiting:
            task.cancel()

    async def close(self) -> None:
        if self._monitor is not None:
            self._monitor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._monitor

    async def _listen(self) -> None:
        answered = time.monotonic()
        while True:
            await asyncio.sleep(self._pause)
            said = await self._ask()
            if said is None:
                answered = time.monotonic()
            elif time.monotonic() - answered >= self._patience:
                self.give_up(
                    EngineUnavailable(
                        f"{self._name} has not answered for {self._patience:g} seconds: {said}"
                    )
                )
                return

    async def _ask(self) -> str | None:
        """None from a live service, otherwise what is wrong with it."""
        try:
            async with httpx.AsyncClient(timeout=10.0, headers=self._headers) as client:
                answer = await client.get(self._url)
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}"
        # Whatever refuses a question is alive; a gateway says 5xx for a server that is not.
        return f"status {answer.status_code}" if answer.status_code >= 500 else None
