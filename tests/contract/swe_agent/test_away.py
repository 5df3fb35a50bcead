"""Jobs whose model's server is not there, or goes away."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.errors import FatalJobError
from spider_worker.agents.episode import Heard, run_episode
from spider_worker.agents.pool import AgentPool
from spider_worker.agents.proxy import LlmProxy
from tests.contract.swe_agent.conftest import PRICE, Job, Warm
from tests.support.agent_model import running_model
from tests.support.fake_docker import running_engine
from tests.support.swe_repos import SweRepo


def test_nobody_at_the_address_is_said_before_anything_begins(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str
) -> None:
    job = Job(folder, warm, repos[:1], python, {repos[0].folder.name: []})
    with pytest.raises(FatalJobError, match="llm_base_url: nobody answers"):
        job.run(llm_base_url="http://127.0.0.1:9/v1")
    assert "instance.started" not in [code for _, code, _, _ in job.ctx.events]


def test_a_server_that_went_away_does_not_use_up_the_data_set(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str
) -> None:
    chosen = repos[:8]
    parts = {repo.folder.name: [{"status": 400, "message": "gone"}] for repo in chosen}
    job = Job(folder, warm, chosen, python, parts)
    with pytest.raises(FatalJobError, match=r"5 instances in a row .* answer of scripted; .*gone"):
        job.run()
    codes = [code for _, code, _, _ in job.ctx.events]
    assert codes.count("instance.ended") < 8
    assert codes.count("instance.started") < 8


def test_tasks_that_the_workspace_cannot_open_are_said_before_anything_begins(
    folder: Path,
    warm: Warm,
    repos: list[SweRepo],
    python: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = Job(folder, warm, repos[:2], python, {repos[0].folder.name: []})
    with (
        running_engine(tmp_path, monkeypatch),
        pytest.raises(FatalJobError, match="2 of the 2 selected instances bring a repository"),
    ):
        job.run(workspace="docker")
    assert job.model is not None
    assert not job.model.requests


def test_a_call_that_a_timeout_cuts_off_is_counted_all_the_same(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str
) -> None:
    parts = {repos[0].folder.name: [{"text": "Too late.", "after": 15.0}]}
    job = Job(folder, warm, repos[:1], python, parts)
    (record,) = job.run(timeout_seconds=10)
    assert record["status"] == "timeout"
    assert record["metrics"]["accumulated_cost"] == pytest.approx(110 * PRICE)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_the_agents_own_sdk_waits_for_a_server_that_comes_back(
    tmp_path: Path, warm: Warm, python: str
) -> None:
    async def back(proxy: LlmProxy, ticket: Any, base_url: str) -> None:
        """Let the server stand there again once three calls have failed."""
        while ticket.failures < 3:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.02)
        proxy._base_url = base_url

    async def main(base_url: str) -> Heard:
        pool = AgentPool(python, folder=tmp_path / "pool", boxes=None, shell_python=python)
        gone = f"http://127.0.0.1:{free_port()}/v1"
        socket = pool.sockets / "away"
        async with pool, LlmProxy(gone, None, socket=socket) as proxy:
            ticket = proxy.issue()
            returning = asyncio.create_task(back(proxy, ticket, base_url))
            request: Mapping[str, Any] = {
                "instruction": "Mend it.",
                "path": str(tmp_path),
                "state": str(tmp_path / "state"),
                "max_iterations": 5,
                "llm": {
                    "model": "openai/m",
                    "api_key": ticket.key,
                    "retry_min_wait": 0,
                    "retry_max_wait": 1,
                },
            }
            heard = await run_episode(
                lambda descriptors: pool.fork(None, descriptors, proxy=str(socket)),
                request,
                log=tmp_path / "log",
                timeout=120,
            )
            await returning
            return heard

    with running_model({"talk": [{"text": "There it is."}]}) as model:
        heard = warm.runner.run(main(model.base_url))
    assert (heard.status, heard.error) == ("finished", None)
