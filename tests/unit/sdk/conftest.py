from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from spider_sdk.transport import RetryPolicy, Transport
from tests.support.scripted_server import ScriptedServer

QUICK = RetryPolicy(attempts=4, base=0.001, cap=0.002)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as running:
        yield running


@pytest.fixture
def waits() -> list[float]:
    """Seconds that were asked to be slept, in order."""
    return []


@pytest.fixture
def connect(server: ScriptedServer, waits: list[float]) -> Iterator[Callable[..., Transport]]:
    made: list[Transport] = []

    def build(**options: object) -> Transport:
        settings: dict[str, object] = {"base_url": server.url, "retries": QUICK}
        made.append(Transport(**{**settings, "sleep": waits.append, **options}))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for transport in made:
        transport.close()
