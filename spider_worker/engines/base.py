"""What an engine is: something that turns messages into completions.

The pipeline hands over single requests and the engine decides how they are batched;
nothing outside an engine ever waits for a batch to be full or to be done.
"""

from __future__ import annotations

__all__ = ["Completion", "Engine", "EngineInfo", "EngineStats", "SamplingParams", "Usage"]

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

SamplingParams = Mapping[str, Any]
"""``generation.parameters`` as the user wrote them (``temperature``, ``top_p``,
``max_tokens``, ``stop`` …) plus ``seed`` where the job has one. An engine refuses a name that
it does not know with NotSupported, when it is built, not on the first row."""


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; None where the endpoint does not say."""

    prompt_tokens: int | None
    completion_tokens: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation.

    ``finish_reason`` is ``stop``, ``length``, ``tool_calls`` or what the endpoint said.
    ``reasoning`` is None where the engine does not tell it apart.
    """

    text: str
    finish_reason: str | None
    usage: Usage
    reasoning: str | None = None
    tool_calls: Sequence[Mapping[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class EngineInfo:
    """``capacity`` is how many requests the engine wants in flight at once; more only
    wait inside it."""

    name: str
    capacity: int


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for progress: ``limit`` is the present bound on requests in flight,
    ``throttled`` how often the endpoint answered 429 so far, ``waiting`` the requests that
    failed and wait to be tried again."""

    in_flight: int
    limit: int
    throttled: int = 0
    retries: int = 0
    waiting: int = 0


class Engine(Protocol):
    """Contract of every engine. All methods are called from one event loop."""

    @property
    def info(self) -> EngineInfo: ...

    def stats(self) -> EngineStats: ...

    async def start(self) -> None:
        """Load the model or open connections. Raises EngineUnavailable, AuthError."""

    async def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        params: SamplingParams,
    ) -> Completion:
        """Generate one continuation of ``messages``.

        Safe to call hundreds of times concurrently; cancelling the task gives the
        request up. Raises RowError (stage ``generation``) when this request cannot
        be answered after the engine's own retries (it is the one owner of them),
        AuthError when no request can.
        """

    async def close(self) -> None:
        """Free the device, processes and connections. Idempotent."""
