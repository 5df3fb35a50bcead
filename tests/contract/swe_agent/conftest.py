"""Whole jobs of coding agents in one process: the real SDK, real boxes, a scripted model."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from spider_sdk.config.model import InputFile, SweConfig
from spider_sdk.errors import EngineUnavailable, JobCancelled
from spider_worker.agents.interpreter import agent_python
from spider_worker.pipelines.local import LocalContext, LocalResources, LocalStore, run_job_locally
from spider_worker.pipelines.swe_agent.build import real_parts
from spider_worker.pipelines.swe_agent.pipeline import SweAgentPipeline
from spider_worker.settings import WorkerSettings
from tests.support.agent_model import AgentModel, Turn, running_model
from tests.support.swe_repos import SweRepo, make_repos

T = TypeVar("T")
PRICE = 1e-3


@pytest.fixture(scope="session")
def repos(tmp_path_factory: pytest.TempPathFactory) -> list[SweRepo]:
    return make_repos(tmp_path_factory.mktemp("repos"))


@pytest.fixture(scope="session")
def python() -> str:
    try:
        return agent_python(os.environ.get("SPIDER_AGENT_PYTHON"))
    except EngineUnavailable as error:
        pytest.skip(error.message)


class Warm:
    """The loop, the folder and the pool of agents that all jobs of a test run share, as those of
    one runner do."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.runner = asyncio.Runner()
        self.pools = LocalResources()

    def close(self) -> None:
        self.runner.run(self.pools.close())
        self.runner.close()


class Resources(LocalResources):
    """A job's own, but for the pool."""

    def __init__(self, warm: Warm) -> None:
        super().__init__()
        self._warm = warm

    async def get(
        self,
        key: str,
        build: Callable[[], Awaitable[T]],
        close: Callable[[T], Awaitable[None]],
        *,
        outlives_job: bool = False,
    ) -> T:
        if outlives_job:
            return await self._warm.pools.get(key, build, close)
        return await super().get(key, build, close)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    warm = Warm(tmp_path_factory.mktemp("worker"))
    yield warm
    warm.close()


def mending(repo: SweRepo) -> list[Turn]:
    """The turns of an agent that knows the answer."""
    name = "/tmp/gold.patch"
    return [
        {"call": "terminal", "args": {"command": "git log --oneline | cat; ls"}},
        {
            "call": "file_editor",
            "args": {"command": "create", "path": name, "file_text": repo.gold_patch},
        },
        {"call": "terminal", "args": {"command": f"git apply {name}"}},
    ]


@dataclasses.dataclass
class Job:
    """A job on chosen repositories. ``events`` and ``store`` are what it left."""

    folder: Path
    warm: Warm
    repos: Sequence[SweRepo]
    python: str
    parts: Mapping[str, Sequence[Turn]]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    model: AgentModel | None = None

    def run(self, **changes: Any) -> list[dict[str, Any]]:
        """The records of ``output.jsonl``."""
        with running_model(self.parts) as self.model:
            return self.warm.runner.run(self._run(changes))

    def break_off(
        self, when: int | Callable[[], object], *, cancel: bool = False, **changes: Any
    ) -> None:
        """Run until the model has had so many requests, or ``when`` says so; then the worker is
        lost, or the job is cancelled."""
        with running_model(self.parts) as self.model:
            model = self.model
            reached = when if callable(when) else lambda: len(model.requests) >= when
            self.warm.runner.run(self._break_off(reached, cancel, changes))

    async def _break_off(
        self, reached: Callable[[], object], cancel: bool, changes: dict[str, Any]
    ) -> None:
        task = asyncio.create_task(self._run(changes))
        while not reached() and not task.done():
            await asyncio.wait([task], timeout=0.02)
        assert not task.done(), task
        if cancel:
            self.ctx.cancel()
            with pytest.raises(JobCancelled):
                await task
        else:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    async def _run(self, changes: dict[str, Any]) -> list[dict[str, Any]]:
        assert self.model is not None
        inputs = self._inputs()
        retry = changes.pop("retry", False)
        job = SweConfig(
            **{
                "llm_model": "scripted",
                "llm_base_url": self.model.base_url,
                "llm_api_key_env": "MODEL_KEY",
                "dataset": "tasks.jsonl",
                "workspace": "bwrap",
                "num_workers": 2,
                "max_retries": 0,
                "input_cost_per_token": PRICE,
                "output_cost_per_token": PRICE,
                "inputs": tuple(
                    InputFile("tasks.jsonl" if path.name == "tasks.jsonl" else path.name, digest)
                    for digest, path in inputs.items()
                ),
                **self.options,
                **changes,
            }
        )
        settings = WorkerSettings(
            state=self.warm.state,
            agent_python=self.python,
            allow_private_urls=True,
            **self.settings,
        )
        parts = real_parts(settings)
        self.store = LocalStore(self.folder / "job")
        self.ctx = LocalContext(
            self.store,
            job,
            secrets={
                "MODEL_KEY": "the-real-key",
                "AZURE_API_BASE": self.model.azure,
                **self.secrets,
            },
            inputs=inputs,
            resources=Resources(self.warm),
        )
        self.result = await run_job_locally(SweAgentPipeline(job, parts), self.ctx, retry=retry)
        output = self.folder / "job" / "artifacts" / "output.jsonl"
        return [json.loads(line) for line in output.read_text().splitlines()]

    def _inputs(self) -> dict[str, Path]:
        self.folder.mkdir(exist_ok=True)
        inputs: dict[str, Path] = {}
        rows = []
        for repo in self.repos:
            digest = hashlib.sha256(repo.bundle.read_bytes()).hexdigest()
            inputs[digest] = repo.bundle
            row = repo.row(source="bundle") | {"repo_source": f"input:{digest}"}
            row["problem_statement"] += f"\n[[part:{repo.folder.name}]]"
            rows.append(row)
        path = self.folder / "tasks.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, text in self.files.items():
            (self.folder / name).write_text(text)
            inputs[hashlib.sha256(text.encode()).hexdigest()] = self.folder / name
        return {hashlib.sha256(path.read_bytes()).hexdigest(): path, **inputs}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "job"
