"""The real parts of the pipeline, as a worker may use them."""

from __future__ import annotations

__all__ = ["real_parts"]

import asyncio
import atexit
import dataclasses
import functools
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from spider_sdk.config.model import SourceConfig, SweConfig
from spider_sdk.config.secrets import without_plain
from spider_sdk.errors import AuthError, FatalJobError, NotSupported
from spider_sdk.remotes import is_remote
from spider_sdk.swe_inputs import REFERENCE
from spider_worker.agents.container import ContainerHost, container_mounts
from spider_worker.agents.hosts import WarmHost
from spider_worker.agents.interpreter import agent_python
from spider_worker.agents.pool import AgentPool
from spider_worker.agents.proxy import LlmProxy
from spider_worker.engines.network import guarded_connector
from spider_worker.engines.registry import EnginePolicy
from spider_worker.evaluation.judge import Judge
from spider_worker.pipelines.swe_agent.checks import (
    check_fit,
    check_image,
    check_interpreter,
    check_remotes,
    probe,
)
from spider_worker.pipelines.swe_agent.endpoint import find_endpoint
from spider_worker.pipelines.swe_agent.parts import Ctx, Endpoint, Host, Judging, Parts
from spider_worker.settings import WorkerSettings
from spider_worker.sinks.hub_repo import HubRepo
from spider_worker.sources.build import build_source
from spider_worker.swe_tasks.base import Task
from spider_worker.swe_tasks.normalise import form_of, to_task
from spider_worker.swe_tasks.selection import select_tasks
from spider_worker.trajectories.push import Pushed, push
from spider_worker.workspaces.base import Workspace
from spider_worker.workspaces.bwrap import BwrapWorkspace
from spider_worker.workspaces.docker import DockerWorkspace
from spider_worker.workspaces.docker_owner import claim_owner, sweep_abandoned
from spider_worker.workspaces.local import LocalWorkspace

_COUNT: Final = itertools.count()
#: Runners of one have no bound of their own: the claim keeps the job's.
_MANY: Final = 1 << 20


def real_parts(settings: WorkerSettings) -> Parts:
    root = settings.state.absolute() / "swe-agent"
    return Parts(
        tasks=functools.partial(_tasks, settings),
        endpoint=functools.partial(_endpoint, settings),
        check=functools.partial(_check, settings, root),
        workspace=lambda ctx, endpoint: _workspace(
            settings, root, ctx, networked=not endpoint.proxied
        ),
        host=functools.partial(_host, settings, root),
        judge=functools.partial(_judge, settings, root),
        push=_push,
        check_hub=_check_hub,
        slots=settings.swe_slots or _MANY,
    )


async def _tasks(settings: WorkerSettings, ctx: Ctx) -> list[Task]:
    """The job's tasks, loaded once in a runner."""

    async def load() -> list[Task]:
        return await asyncio.to_thread(_load_tasks, settings, ctx)

    async def forget(_: list[Task]) -> None:
        """Nothing to close."""

    return await ctx.resources.get("swe-agent:tasks", load, forget)


def _load_tasks(settings: WorkerSettings, ctx: Ctx) -> list[Task]:
    job = ctx.job
    paths = {file.name: ctx.input_path(file.sha256) for file in job.inputs}
    inputs = tuple(file for file in job.inputs if file.name == job.dataset)
    source = build_source(
        SourceConfig(job.dataset, split=job.split, inputs=inputs),
        {file.name: paths[file.name] for file in inputs},
        None,
        ctx.secrets.get("HF_TOKEN"),
        data_roots=EnginePolicy.from_settings(settings).data_roots,
    )
    references = {REFERENCE + file.sha256: str(paths[file.name]) for file in job.inputs}
    try:
        columns = source.columns()
        rows: Iterator[dict[str, Any]] = (
            row for batch in source.batches(0, None) for _, row in batch
        )
        if columns is None:
            first = next(rows, None)
            columns = list(first or ())
            rows = itertools.chain([first] if first is not None else [], rows)
        form = form_of(columns)
        tasks = (_task(row, references, form) for row in rows)
        return select_tasks(
            tasks,
            instance_filter=job.instance_filter,
            max_instances=job.max_instances,
            seed=job.seed,
        )
    finally:
        source.close()


def _task(row: dict[str, Any], references: Mapping[str, str], form: str) -> Task | None:
    """The task of a row, which it holds as it came: where a file lies here is nobody's matter."""
    task = to_task(_resolved(row, references), form=form)
    return None if task is None else dataclasses.replace(task, row=row)


def _resolved(row: dict[str, Any], references: Mapping[str, str]) -> dict[str, Any]:
    """The row with the file in place of a reference to an uploaded one. No path that a job names
    by itself is opened here."""
    named = row.get("repo_source")
    if not isinstance(named, str) or is_remote(named):
        return row
    if named not in references:
        raise FatalJobError(
            f"{row.get('instance_id')}: repo_source {named!r} is no uploaded repository; submit "
            "the file with `spider-scaffold openhands` or `spider submit`, which upload them"
        )
    return {**row, "repo_source": references[named]}


async def _endpoint(settings: WorkerSettings, ctx: Ctx) -> Endpoint:
    async def find() -> Endpoint:
        return await find_endpoint(settings, ctx)

    async def forget(_: Endpoint) -> None:
        """Nothing to close."""

    return await ctx.resources.get("swe-agent:endpoint", find, forget)


async def _check(
    settings: WorkerSettings, root: Path, ctx: Ctx, endpoint: Endpoint, tasks: Sequence[Task]
) -> Endpoint:
    check_fit(tasks, ctx.job.workspace)
    await asyncio.to_thread(check_remotes, tasks, allow_private=settings.allow_private_urls)
    found = await probe(ctx.job, endpoint, allow_private=settings.allow_private_urls)
    if ctx.job.workspace == "docker":
        await check_image(tasks[0])
        python = agent_python(settings.agent_python)
        await check_interpreter(tasks[0], _workspace(settings, root, ctx), python)
    return found


def _workspace(
    settings: WorkerSettings, root: Path, ctx: Ctx, *, networked: bool = False
) -> Workspace:
    """``networked``: an agent whose model is reached directly has to get there from a container."""
    boxes = root / "boxes"
    match ctx.job.workspace:
        case "bwrap":
            return BwrapWorkspace(
                boxes, allow_private=settings.allow_private_urls, hidden=_hidden(settings)
            )
        case "local":
            return LocalWorkspace(
                boxes,
                allowed=settings.allow_local_workspace,
                allow_private=settings.allow_private_urls,
            )
        case "docker":
            python = agent_python(settings.agent_python)
            return DockerWorkspace(
                boxes,
                owner=claim_owner(root / "owners"),
                mounts=container_mounts(python, root / "containers", _sockets()),
                network=networked,
            )
        case kind:
            raise NotSupported(f"workspace: {kind}: expected docker, bwrap or local")


async def _host(settings: WorkerSettings, root: Path, ctx: Ctx, endpoint: Endpoint) -> Host:
    python = agent_python(settings.agent_python)
    boxes = root / "boxes"
    if ctx.job.workspace == "docker":
        await sweep_abandoned(root / "owners", boxes)
        proxy = await _proxy(settings, endpoint, _sockets())
        return ContainerHost(python, _llm(ctx.job, endpoint), proxy=proxy)
    confined = ctx.job.workspace == "bwrap"

    async def warm() -> AgentPool:
        pool = AgentPool(
            python,
            folder=root / f"pool-{os.getpid()}-{next(_COUNT)}",
            boxes=boxes if confined else None,
            shell_python=sys.executable,
            hidden=_hidden(settings),
        )
        await pool.start()
        return pool

    pool = await ctx.resources.get(
        f"swe-agent:pool:{confined}", warm, lambda pool: pool.close(), outlives_job=True
    )
    proxy = await _proxy(settings, endpoint, pool.sockets)
    return WarmHost(pool, _llm(ctx.job, endpoint), proxy=proxy, boxes=boxes)


def _hidden(settings: WorkerSettings) -> tuple[Path, ...]:
    """What this deployment keeps: other jobs' work and keys, where they lie beside programs."""
    return (settings.state.absolute(), Path.cwd() / ".spider")


async def _proxy(settings: WorkerSettings, endpoint: Endpoint, sockets: Path) -> LlmProxy | None:
    """The started proxy to the endpoint; None where agents reach it by themselves."""
    if not endpoint.proxied:
        return None
    assert endpoint.base_url is not None
    proxy = LlmProxy(
        endpoint.base_url,
        endpoint.key,
        socket=sockets / f"model-{os.getpid()}-{next(_COUNT)}",
        prices=endpoint.prices,
        connector=lambda: guarded_connector(
            allow_private=settings.allow_private_urls, proxied=False, where="llm_base_url"
        ),
    )
    await proxy.start()
    return proxy


@functools.cache
def _sockets() -> Path:
    """A folder for this process's sockets: a socket's path has 107 bytes at most."""
    folder = Path(tempfile.mkdtemp(prefix="spider-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _llm(job: SweConfig, endpoint: Endpoint) -> dict[str, Any]:
    """Arguments of ``spider_agent.llm.make_llm``, but for what a proxy puts in their place."""
    llm: dict[str, Any] = {
        "model": endpoint.model,
        "temperature": job.temperature,
        "input_cost_per_token": endpoint.prices.input,
        "output_cost_per_token": endpoint.prices.output,
    }
    if not endpoint.proxied:
        llm |= {"api_key": endpoint.key, "base_url": endpoint.base_url}
        llm["variables"] = dict(endpoint.variables) or None
    return {key: value for key, value in llm.items() if value is not None}


def _judge(settings: WorkerSettings, root: Path, ctx: Ctx) -> Judging:
    """In boxes of the same kind, which have no network."""
    workspace = _workspace(settings, root, ctx)
    judge = Judge(workspace, timeout=ctx.job.timeout_seconds, cache=root / "gold-checks")

    async def judged(task: Task, patch: str | None) -> Mapping[str, Any]:
        return (await judge.judge(task, patch)).to_json()

    return judged


def _push(ctx: Ctx, output: Path) -> Pushed:
    job = ctx.job
    assert job.hf_repo_id is not None
    return push(
        output,
        job.hf_repo_id,
        token=ctx.secrets.get("HF_TOKEN"),
        private=job.hf_private,
        config_name=job.hf_config_name,
        push_filter=job.push_filter,
        messages_format=job.messages_format,
        secrets=without_plain(ctx.secrets).values(),
        work_dir=ctx.scratch,
    )


def _check_hub(ctx: Ctx) -> None:
    assert ctx.job.hf_repo_id is not None
    token = ctx.secrets.get("HF_TOKEN")
    if not token:
        raise AuthError("hf_repo_id: nothing can be pushed without a token; set HF_TOKEN")
    repo = HubRepo(ctx.job.hf_repo_id, token=token, options="hf_")
    repo.ensure(private=ctx.job.hf_private)
    repo.prove_write()
