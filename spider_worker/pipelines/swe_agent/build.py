"""The real parts of the pipeline, as a worker may use them."""

from __future__ import annotations

__all__ = ["real_parts"]

import asyncio
import functools
import itertools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from spider_sdk.config.model import SourceConfig, SweConfig
from spider_sdk.errors import AuthError, FatalJobError, NotSupported
from spider_worker.agents.hosts import WarmHost
from spider_worker.agents.interpreter import agent_python, ask_model
from spider_worker.agents.pool import AgentPool
from spider_worker.agents.proxy import LlmProxy, Prices
from spider_worker.engines.network import guarded_connector
from spider_worker.engines.registry import EnginePolicy
from spider_worker.evaluation.judge import Judge
from spider_worker.pipelines.swe_agent.parts import Ctx, Endpoint, Host, Judging, Parts
from spider_worker.settings import WorkerSettings
from spider_worker.sinks.hub_repo import HubRepo
from spider_worker.sources.build import build_source
from spider_worker.swe_tasks.base import Task
from spider_worker.swe_tasks.normalise import normalise
from spider_worker.swe_tasks.selection import select
from spider_worker.trajectories.push import Pushed, push
from spider_worker.workspaces.base import Workspace
from spider_worker.workspaces.bwrap import BwrapWorkspace
from spider_worker.workspaces.local import LocalWorkspace

_COUNT: Final = itertools.count()
#: Prefixes of LiteLLM's that mean an OpenAI-compatible endpoint at the given address.
#: Runners of one have no bound of their own: the claim keeps the job's.
_MANY: Final = 1 << 20
#: Providers whose protocol is their own, at whatever address.
_NATIVE: Final = frozenset({"anthropic", "azure", "bedrock", "gemini", "vertex_ai"})
_COMPATIBLE: Final = frozenset({"openai", "hosted_vllm", "litellm_proxy", "custom_openai"})
_OPENAI: Final = "https://api.openai.com/v1"


def real_parts(settings: WorkerSettings) -> Parts:
    root = settings.state.absolute() / "swe-agent"
    return Parts(
        tasks=functools.partial(_tasks, settings),
        endpoint=functools.partial(_endpoint, settings),
        workspace=functools.partial(_workspace, settings, root),
        host=functools.partial(_host, settings, root),
        judge=functools.partial(_judge, root),
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
    try:
        rows = [row for batch in source.batches(0, None) for _, row in batch]
    finally:
        source.close()
    uploaded = {file.sha256: ctx.input_path(file.sha256) for file in job.inputs}
    return select(
        normalise(rows, uploaded),
        instance_filter=job.instance_filter,
        max_instances=job.max_instances,
        seed=job.seed,
    )


async def _endpoint(settings: WorkerSettings, ctx: Ctx) -> Endpoint:
    async def find() -> Endpoint:
        return await _find_endpoint(settings, ctx)

    async def forget(_: Endpoint) -> None:
        """Nothing to close."""

    return await ctx.resources.get("swe-agent:endpoint", find, forget)


async def _find_endpoint(settings: WorkerSettings, ctx: Ctx) -> Endpoint:
    """Raises FatalJobError for a name that is no model's, a key that is missing, and a cap on
    money where nobody knows the price."""
    job = ctx.job
    key = _key(ctx)
    if job.llm_base_url is not None and job.llm_model.split("/")[0] not in _NATIVE:
        # Whatever the endpoint calls it: LiteLLM is told the protocol, which leaves the rest as it
        # is.
        prefixed = job.llm_model.split("/")[0] in _COMPATIBLE
        model = job.llm_model if prefixed else f"openai/{job.llm_model}"
        found = await ask_model(agent_python(settings.agent_python), job.llm_model, None)
        return _capped(job, Endpoint(model, job.llm_base_url, key, True, _prices(job, found)))
    found = await ask_model(agent_python(settings.agent_python), job.llm_model, job.llm_base_url)
    if found["provider"] is None:
        raise FatalJobError(
            f"llm_model: {job.llm_model} is no name that LiteLLM knows a provider of; write "
            "provider/model (for instance anthropic/claude-sonnet-4-5), or give llm_base_url for a "
            "server that speaks OpenAI's protocol"
        )
    if found["provider"] == "openai":
        endpoint = Endpoint(job.llm_model, _OPENAI, key, True, _prices(job, found))
    else:
        endpoint = Endpoint(job.llm_model, job.llm_base_url, key, False, _prices(job, found))
    if key is None:
        raise FatalJobError(
            f"llm_model: {job.llm_model} needs a key; set llm_api_key_env to the variable that "
            "holds it"
        )
    return _capped(job, endpoint)


def _key(ctx: Ctx) -> str | None:
    job = ctx.job
    names = [job.llm_api_key_env] if job.llm_api_key_env else []
    if not names and job.llm_base_url is None:
        provider = job.llm_model.split("/")[0]
        names = ["ANTHROPIC_API_KEY" if provider in _NATIVE else "OPENAI_API_KEY"]
    return next((ctx.secrets[name] for name in names if ctx.secrets.get(name)), None)


def _prices(job: SweConfig, found: Mapping[str, Any]) -> Prices:
    def first(given: float | None, known: Any) -> float | None:
        return given if given is not None else known

    return Prices(
        first(job.input_cost_per_token, found["input_cost_per_token"]),
        first(job.output_cost_per_token, found["output_cost_per_token"]),
    )


def _capped(job: SweConfig, endpoint: Endpoint) -> Endpoint:
    capped = job.max_budget_per_instance is not None or job.max_budget_total is not None
    if capped and None in (endpoint.prices.input, endpoint.prices.output):
        raise FatalJobError(
            f"there is a cap on money, and nobody knows what {job.llm_model} costs: give "
            "input_cost_per_token and output_cost_per_token (dollars a token; 0 for a model of "
            "your own)"
        )
    return endpoint


def _workspace(settings: WorkerSettings, root: Path, ctx: Ctx) -> Workspace:
    match ctx.job.workspace:
        case "bwrap":
            return BwrapWorkspace(root / "boxes")
        case "local":
            return LocalWorkspace(root / "boxes", allowed=settings.allow_local_workspace)
        case kind:
            raise NotSupported(f"workspace: {kind} is not built yet; use bwrap")


async def _host(settings: WorkerSettings, root: Path, ctx: Ctx, endpoint: Endpoint) -> Host:
    job = ctx.job
    confined = job.workspace == "bwrap"
    python = agent_python(settings.agent_python)
    boxes = root / "boxes"

    async def warm() -> AgentPool:
        pool = AgentPool(
            python,
            folder=root / f"pool-{os.getpid()}-{next(_COUNT)}",
            boxes=boxes if confined else None,
            shell_python=sys.executable,
        )
        await pool.start()
        return pool

    pool = await ctx.resources.get(
        f"swe-agent:pool:{confined}", warm, lambda pool: pool.close(), outlives_job=True
    )
    llm: dict[str, Any] = {
        "model": endpoint.model,
        "temperature": job.temperature,
        "input_cost_per_token": endpoint.prices.input,
        "output_cost_per_token": endpoint.prices.output,
    }
    proxy = None
    if endpoint.proxied:
        assert endpoint.base_url is not None
        allow = settings.allow_private_urls
        proxy = LlmProxy(
            endpoint.base_url,
            endpoint.key,
            socket=pool.sockets / f"model-{next(_COUNT)}",
            prices=endpoint.prices,
            connector=lambda: guarded_connector(
                allow_private=allow, proxied=False, where="llm_base_url"
            ),
        )
        await proxy.start()
    else:
        llm |= {"api_key": endpoint.key, "base_url": endpoint.base_url}
    given = {key: value for key, value in llm.items() if value is not None}
    return WarmHost(pool, given, proxy=proxy, boxes=boxes)


def _judge(root: Path, ctx: Ctx, workspace: Workspace) -> Judging:
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
        secrets=ctx.secrets.values(),
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
