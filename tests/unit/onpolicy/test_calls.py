"""Events that nobody waits for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from spider_sdk.errors import FleetUnavailable, LeaseLost
from spider_worker.pipelines.calls import Announcer


@pytest.mark.parametrize("error", [FleetUnavailable("away"), LeaseLost("taken")])
def test_an_event_that_cannot_be_sent_hides_no_error_of_the_run(error: Exception) -> None:
    class Context:
        def event(self, *_: Any) -> None:
            raise error

    async def run() -> None:
        context: Any = Context()
        announcer = Announcer(context)
        announcer.say("info", "code", "said", {})
        await announcer.finish()

    asyncio.run(run())
