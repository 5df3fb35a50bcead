"""What the pipeline needs of the worker, by function: tests give others."""

from __future__ import annotations

__all__ = ["Endpoint", "Host", "Judging", "Parts"]

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from spider_sdk.config.model import SweConfig
from spider_worker.agents.episode import Heard, Listener
from spider_worker.agents.proxy import Prices, Ticket
from spider_worker.pipelines.base import JobContext
from spider_worker.swe_tasks.base import Task
from spider_worker.trajectories.push import Pushed
from spider_worker.workspaces.base import Box, Workspace


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """How the model is reached. ``model`` is the name that the agent's SDK is given; ``key`` is
    None where the model wants none; ``base_url`` None is the provider's own. Through a proxy
    (``proxied``) the agent sees neither of them. ``variables`` are what LiteLLM looks up for a
    provider that one key does not open. ``versions`` are those of the packages that agents are made
    of."""

    model: str
    base_url: str | None
    key: str | None
    proxied: bool
    prices: Prices = Prices()
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)


class Host(Protocol):
    """Where agents run, for one job in one runner."""

    def ticket(self, *, max_calls: int | None, max_cost: float | None) -> Ticket | None:
        """The right of one episode to call the model; None where it calls it by itself."""

    async def run(
        self,
        box: Box,
        request: Mapping[str, Any],
        *,
        ticket: Ticket | None,
        log: Path,
        timeout: float,  # noqa: ASYNC109 - it kills, cancelling waits
        listener: Listener,
        stop: Callable[[], Awaitable[None]],
    ) -> Heard:
        """Run an episode in ``box`` to its end, or until ``stop`` returns. The request
        lacks ``path``, ``state`` and the address and key of the model. Raises WorkspaceError where
        it cannot be started."""

    async def close(self) -> None: ...


class Judging(Protocol):
    async def __call__(self, task: Task, patch: str | None) -> Mapping[str, Any]:
        """The report on a patch, ``resolved`` in it."""


Ctx = JobContext[SweConfig]


@dataclasses.dataclass(frozen=True)
class Parts:
    """``tasks`` gives the selected tasks, in order (cached in the runner); ``endpoint`` raises
    FatalJobError for a model that has no key or cannot be capped as asked, ``check`` for one that
    does not answer and for tasks that cannot be opened, and gives the endpoint under its own name
    for the model; ``slots`` is how many instances one runner has at work at most."""

    tasks: Callable[[Ctx], Awaitable[list[Task]]]
    endpoint: Callable[[Ctx], Awaitable[Endpoint]]
    check: Callable[[Ctx, Endpoint, Sequence[Task]], Awaitable[Endpoint]]
    workspace: Callable[[Ctx, Endpoint], Workspace]
    host: Callable[[Ctx, Endpoint], Awaitable[Host]]
    judge: Callable[[Ctx], Judging]
    push: Callable[[Ctx, Path], Pushed]
    check_hub: Callable[[Ctx], None]
    slots: int
