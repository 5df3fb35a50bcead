"""Where the episodes of one job run: the warm pool, and the way from there to the model."""

from __future__ import annotations

__all__ = ["ModelHost", "WarmHost"]

import contextlib
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from spider_worker.agents.episode import Heard, Listener, run_episode
from spider_worker.agents.pool import AgentPool
from spider_worker.agents.proxy import LlmProxy, Ticket
from spider_worker.workspaces.base import Box
from spider_worker.workspaces.bwrap import HOME, TREE, BwrapBox
from spider_worker.workspaces.pids import pids_group

#: Processes and threads of one episode. An agent's own are about thirty.
PIDS: Final = 1024
#: Seconds for the model to end an answer that nobody waits for any more, so that it is known what
#: it cost; and where a job is cancelled, which has to end soon.
_PATIENCE: Final = 30.0
_HASTE: Final = 2.0


class ModelHost:
    """The way of a job's agents to their model. ``llm`` are arguments of the SDK's ``LLM``, the
    same for all; with a ``proxy`` its address takes the place of the model's, and a ticket that of
    the key."""

    def __init__(self, llm: Mapping[str, Any], *, proxy: LlmProxy | None) -> None:
        self._llm = dict(llm)
        self._proxy = proxy

    def ticket(self, *, max_calls: int | None, max_cost: float | None) -> Ticket | None:
        if self._proxy is None:
            return None
        return self._proxy.issue(max_calls=max_calls, max_cost=max_cost)

    @contextlib.contextmanager
    def _access(self, ticket: Ticket | None) -> Iterator[dict[str, Any]]:
        """The arguments of one episode's ``LLM``; its ticket is worth nothing afterwards."""
        try:
            yield self._llm | ({"api_key": ticket.key} if ticket is not None else {})
        finally:
            if self._proxy is not None and ticket is not None:
                self._proxy.revoke(ticket)

    async def _settle(self, ticket: Ticket | None, heard: Heard) -> Heard:
        """Have the calls counted that the episode's end has cut off."""
        if self._proxy is not None and ticket is not None:
            cancelled = heard.status == "cancelled"
            await self._proxy.settle(ticket, _HASTE if cancelled else _PATIENCE)
        return heard

    async def close(self) -> None:
        """End the job's part; a pool is another's to close."""
        if self._proxy is not None:
            await self._proxy.close()


class WarmHost(ModelHost):
    """Episodes of ``pool``, whose trees lie under ``boxes``."""

    def __init__(
        self, pool: AgentPool, llm: Mapping[str, Any], *, proxy: LlmProxy | None, boxes: Path
    ) -> None:
        super().__init__(llm, proxy=proxy)
        self._pool = pool
        self._boxes = boxes

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
        with contextlib.ExitStack() as stack:
            llm = stack.enter_context(self._access(ticket))
            state = "/tmp/.agent-state"  # noqa: S108 - the box's own
            plan = None
            if self._pool.confined:
                assert isinstance(box, BwrapBox)
                plan = {
                    "tree": str(box.folder / "tree"),
                    "path": TREE,
                    "boxes": str(self._boxes),
                    "home": HOME,
                    "network": self._proxy is None,
                }
            else:
                state = stack.enter_context(tempfile.TemporaryDirectory(prefix="agent-state-"))
            cgroup = stack.enter_context(pids_group("agent", PIDS))
            proxy = None
            if self._proxy is not None:
                proxy = self._pool.socket_path(self._proxy.socket.name)
            heard = await run_episode(
                lambda descriptors: self._pool.fork(plan, descriptors, proxy=proxy),
                {**request, "path": box.path, "state": state, "llm": llm},
                log=log,
                timeout=timeout,
                cgroup=cgroup,
                listener=listener,
                stop=stop,
            )
            return await self._settle(ticket, heard)
