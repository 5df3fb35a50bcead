"""One warm pool for all tests of agents, with the real OpenHands SDK."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from spider_sdk.errors import EngineUnavailable
from spider_worker.agents.episode import Heard, run_episode
from spider_worker.agents.interpreter import agent_python
from spider_worker.agents.pool import AgentPool
from spider_worker.agents.proxy import LlmProxy, Prices, Ticket
from tests.support.agent_model import AgentModel, Turn, running_model

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]
PRICE = 1e-3  # dollars a token: a scripted call has 110


@pytest.fixture(scope="session")
def run() -> Iterator[Run[Any]]:
    """Runs a coroutine on the loop that the session's pools live on."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="session")
def python() -> str:
    try:
        return agent_python(os.environ.get("SPIDER_AGENT_PYTHON"))
    except EngineUnavailable as error:
        pytest.skip(error.message)


@pytest.fixture(scope="session")
def root() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="spider-agents-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def canary() -> Iterator[str]:
    """A value in this process's environment as long as any pool lives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CANARY_TOKEN", "canary-f3b1")
        yield "canary-f3b1"


@pytest.fixture(scope="session", params=["bwrap", "local"])
def pool(
    request: pytest.FixtureRequest,
    run: Run[Any],
    python: str,
    root: Path,
    canary: str,  # before the pool
) -> Iterator[AgentPool]:
    confined = request.param == "bwrap"
    if confined and shutil.which("bwrap") is None:
        pytest.skip("no bubblewrap (make system installs it)")
    pool = AgentPool(
        python,
        folder=root / request.param,
        boxes=root / "boxes" if confined else None,
        shell_python=sys.executable,
    )
    run(pool.start())
    yield pool
    run(pool.close())


class Stage:
    """A tree, a scripted model behind a proxy, and episodes on them. ``ticket`` is the last
    episode's."""

    def __init__(self, pool: AgentPool, run: Run[Any], root: Path, tmp_path: Path) -> None:
        self.pool = pool
        self.tmp_path = tmp_path
        self._run = run
        self._boxes = root / "boxes"
        box = Path(tempfile.mkdtemp(prefix="box-", dir=_made(self._boxes)))
        self.tree = box / "tree"
        self.tree.mkdir()
        self.path = "/testbed" if pool.confined else str(self.tree)
        self.log = tmp_path / "agent.log"
        self.ticket: Ticket | None = None
        self.model: AgentModel | None = None

    def play(self, part: Sequence[Turn], **options: Any) -> Heard:
        """An agent in the tree, its model playing ``part``. See ``Episode`` for most options;
        those of the request, and ``max_cost`` and ``max_calls``, go where they belong."""
        with running_model({"play": part}) as self.model:
            return self._run(self._play(self.model, options))

    async def _play(self, model: AgentModel, options: dict[str, Any]) -> Heard:
        request = {
            "instruction": options.pop("instruction", "Mend it. [[part:play]]"),
            "path": self.path,
            "state": "/tmp/state" if self.pool.confined else str(self.tmp_path / "state"),
            "max_iterations": options.pop("max_iterations", 20),
            "max_budget": options.pop("max_budget", None),
            "condenser": options.pop("condenser", False),
        }
        caps = {name: options.pop(name, None) for name in ("max_cost", "max_calls")}
        socket = self.pool.sockets / f"model-{self.tree.parent.name}"
        async with LlmProxy(
            model.base_url, "the-real-key", socket=socket, prices=Prices(PRICE, PRICE)
        ) as proxy:
            self.ticket = proxy.issue(**caps)
            request["llm"] = {
                "model": "openai/scripted",
                "api_key": self.ticket.key,
                "num_retries": 0,
                "input_cost_per_token": PRICE,
                "output_cost_per_token": PRICE,
            }
            path = self.pool.socket_path(socket.name)
            return await run_episode(
                lambda descriptors: self.pool.fork(self.plan(), descriptors, proxy=path),
                request,
                log=self.log,
                **{"timeout": 120, **options},
            )

    def plan(self) -> Mapping[str, Any] | None:
        if not self.pool.confined:
            return None
        return {
            "tree": str(self.tree),
            "path": "/testbed",
            "boxes": str(self._boxes),
            "home": "/home/agent",
        }


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def stage(pool: AgentPool, run: Run[Any], root: Path, tmp_path: Path) -> Stage:
    return Stage(pool, run, root, tmp_path)
