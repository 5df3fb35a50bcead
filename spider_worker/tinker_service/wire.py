"""The HTTP client under versions of the SDK that speak JSON, watched for results that never come.

A server that cannot put a result into JSON (a loss that is no finite number) answers 500 each time
it is asked for it, and the SDK asks for ever, without a pause.
"""

from __future__ import annotations

__all__ = ["Wire"]

import asyncio
import json
import time
from collections.abc import Callable
from typing import Final

import httpx

_RESULT: Final = "/api/v1/retrieve_future"
_TIMES: Final = 4
_SECONDS: Final = 5.0


class Wire:
    """``client`` has the SDK's own settings. ``stuck`` is called, on the SDK's thread, when one
    result was answered by 500 many times in a row, with what the server said."""

    def __init__(self, stuck: Callable[[str], object]) -> None:
        self._stuck = stuck
        self._failing: dict[str, tuple[int, float]] = {}  # result: times in a row, since when
        self._loop: asyncio.AbstractEventLoop | None = None
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(60.0, connect=5.0),
            limits=httpx.Limits(max_connections=1000, max_keepalive_connections=20),
            follow_redirects=True,
            http2=True,
            event_hooks={"response": [self._seen]},
        )

    async def close(self) -> None:
        """On the loop that the client was used on, if it was."""
        if self._loop is None:
            await self.client.aclose()
            return
        closing = asyncio.run_coroutine_threadsafe(self.client.aclose(), self._loop)
        await asyncio.wrap_future(closing)

    async def _seen(self, response: httpx.Response) -> None:
        self._loop = asyncio.get_running_loop()
        if not response.request.url.path.endswith(_RESULT):
            return
        result = str(json.loads(response.request.content).get("request_id"))
        if response.status_code != 500:
            self._failing.pop(result, None)
            return
        times, since = self._failing.get(result, (0, time.monotonic()))
        self._failing[result] = (times + 1, since)
        if times + 1 >= _TIMES and time.monotonic() - since >= _SECONDS:
            del self._failing[result]
            await response.aread()
            self._stuck(response.text[:500])
