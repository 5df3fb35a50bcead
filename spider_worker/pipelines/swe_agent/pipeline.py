"""The pipeline of coding agents: an instance is a unit, many at work at once in a runner."""

from __future__ import annotations

__all__ = ["SweAgentPipeline"]

import asyncio
import dataclasses
import datetime
import importlib.metadata
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from spider_sdk.config.model import SweConfig
from spider_sdk.errors import FatalJobError, UsageError
from spider_worker.pipelines.base import (
    Counters,
    JobContext,
    JobResult,
    Plan,
    UnitContext,
    UnitOutcome,
    UnitSpec,
)
from spider_worker.pipelines.calls import announce
from spider_worker.pipelines.swe_agent.attempts import Attempts
from spider_worker.pipelines.swe_agent.gathering import gather, said, write_metadata
from spider_worker.pipelines.swe_agent.journal import Journal, Past, read_past
from spider_worker.pipelines.swe_agent.left_out import read_left_out
from spider_worker.pipelines.swe_agent.parts import Endpoint, Host, Parts
from spider_worker.pipelines.swe_agent.silence import Silence
from spider_worker.pipelines.swe_agent.spending import Spent
from spider_worker.pipelines.swe_agent.transcript import Transcript
from spider_worker.swe_tasks.base import Task
from spider_worker.trajectories.commit import spider_commit
from spider_worker.trajectories.layout import INFER_LOGS, METADATA, OUTPUT, log_name
from spider_worker.trajectories.metadata import run_metadata
from spider_worker.trajectories.record import is_done

log = logging.getLogger(__name__)

#: Seconds for agents to be ended and what they did to be written down, after a cancel.
GRACE: Final = 10.0
#: Keys of the state: when the job was planned first, and versions of what its agents are made of.
_STARTED: Final = "started"
_VERSIONS: Final = "versions"
_MODEL: Final = "model"  # its name at the endpoint
Ctx = JobContext[SweConfig]
UnitCtx = UnitContext[SweConfig]


class SweAgentPipeline:
    """One job."""

    grace = GRACE

    def __init__(self, job: SweConfig, parts: Parts) -> None:
        self._job = job
        self._parts = parts
        self._live = 0
        self._waiting: list[UnitCtx] = []
        self._silence = Silence(job.llm_model)
        # Boxes of instances that begin together are made one after another, as many at a time as
        # there are cores: the first agents begin sooner, the last no later, and none of them
        # thinks and works in step with all the others.
        self._turn = asyncio.Semaphore(len(os.sched_getaffinity(0)))

    async def plan(self, ctx: Ctx) -> Plan:
        """Raises FatalJobError and its kin for whatever would fail later: the model's name, its
        price where there is a cap, the key, the agent's interpreter, the workspace, the data set,
        the Hub."""
        job = self._job
        await announce(ctx, "job.planning", "checking the model, the workspace and the data set")
        endpoint = await self._parts.endpoint(ctx)
        workspace = self._parts.workspace(ctx, endpoint)
        await workspace.check()
        if job.hf_repo_id is not None:
            await asyncio.to_thread(self._parts.check_hub, ctx)
        tasks = await self._parts.tasks(ctx)
        if not tasks:
            raise FatalJobError(
                f"no instance of {job.dataset} ({job.split}) is selected: instance_filter "
                f"{job.instance_filter!r} must match an instance_id from its start"
            )
        left_out = await asyncio.to_thread(read_left_out, ctx)
        to_do = [
            task
            for task in tasks
            if any((task.instance_id, n) not in left_out for n in range(job.n_attempts))
        ]
        endpoint = await self._named(ctx, endpoint, to_do or tasks)
        await self._host(ctx, endpoint)
        units = [
            UnitSpec(
                f"instance-{number * job.n_attempts + n:06d}",
                number * job.n_attempts + n,
                {"index": number, "instance_id": task.instance_id, "n": n},
            )
            for number, task in enumerate(tasks)
            for n in range(job.n_attempts)
            if (task.instance_id, n) not in left_out
        ]
        began = (await asyncio.to_thread(ctx.load_state)).get(_STARTED) or _now()
        state = {_STARTED: began, _VERSIONS: dict(endpoint.versions), _MODEL: endpoint.model}
        await asyncio.to_thread(ctx.save_state, state)
        return Plan(units=units, rows_total=len(units))

    async def run(self, ctx: UnitCtx) -> UnitOutcome:
        self._enter(ctx)
        try:
            return await self._run(ctx)
        finally:
            self._leave(ctx)

    async def publish(self, ctx: Ctx) -> None:
        """Nothing is published before the end: see ``finalise``."""

    async def finalise(self, ctx: Ctx) -> JobResult:
        output = ctx.scratch / OUTPUT
        tally = await asyncio.to_thread(gather, ctx.shards(), output)
        versions = (await asyncio.to_thread(ctx.load_state)).get(_VERSIONS) or {}
        metadata = write_metadata(await self._metadata(ctx, versions), ctx.scratch / METADATA)
        message = said(tally)
        remote = None
        if self._job.hf_repo_id is not None:
            remote, pushed = await self._push(ctx, output)
            message += f"; {pushed}"
        files = {OUTPUT: output, METADATA: metadata}
        return JobResult(remote_artifact=remote, message=message, files=files)

    async def _push(self, ctx: Ctx, output: Path) -> tuple[str | None, str]:
        """The address on the Hub and a word on it. That there is nothing to push takes nothing
        away from what was done, and is said."""
        try:
            pushed = await asyncio.to_thread(self._parts.push, ctx, output)
        except UsageError as error:
            ctx.event("warning", "push.nothing", error.message)
            return None, "nothing was pushed"
        if pushed.redacted:
            ctx.event(
                "warning",
                "push.redacted",
                f"secrets were taken out of {len(pushed.redacted)} trajectories before they left",
                {"instances": {key: dict(kinds) for key, kinds in pushed.redacted.items()}},
            )
        word = f"{pushed.rows} pushed"
        if pushed.left_out:
            word += f", {pushed.left_out} without a turn of the agent left out"
        return pushed.url, word

    # -- an instance -----------------------------------------------------------------

    async def _run(self, ctx: UnitCtx) -> UnitOutcome:
        spec = ctx.unit.spec
        n = int(spec["n"])
        tasks = await self._parts.tasks(ctx)
        task = tasks[int(spec["index"])]
        if task.instance_id != spec["instance_id"]:
            raise FatalJobError(
                f"the data set has changed since the job was planned: {spec['instance_id']} is "
                f"not where it was"
            )
        endpoint = await self._endpoint(ctx)
        host = await self._host(ctx, endpoint)
        workspace = self._parts.workspace(ctx, endpoint)
        past = await asyncio.to_thread(read_past, ctx.previous())
        journal = Journal(ctx.open_journal())
        try:
            await asyncio.to_thread(journal.take_over, past)
            name = log_name(task.instance_id, n)
            transcript = await asyncio.to_thread(self._transcript, ctx, name, past)
            attempts = Attempts(
                ctx,
                task,
                n,
                workspace=workspace,
                host=host,
                judge=self._parts.judge(ctx) if self._job.evaluate else None,
                journal=journal,
                past=past,
                metadata=await self._metadata(ctx, endpoint.versions),
                transcript=transcript,
                turn=self._turn,
                report=lambda spent: ctx.progress(
                    _spending(ctx, spent),
                    {
                        "instance": task.instance_id,
                        "n": n,
                        "attempt": attempts.number,
                        "turns": spent.turns,
                        "cost": spent.attempt_cost,
                    },
                ),
            )
            ctx.publish_journal()
            begun = {"instance": task.instance_id, "n": n}
            await announce(ctx, "instance.started", task.instance_id, begun)
            await attempts.run()
        finally:
            journal.close()
        if attempts.records:
            self._silence.ended(attempts.records[-1])
        return await self._outcome(ctx, attempts, transcript.path, n)

    async def _outcome(
        self, ctx: UnitCtx, attempts: Attempts, log_file: Path, n: int
    ) -> UnitOutcome:
        records = attempts.records
        shard = ctx.scratch / "records.jsonl"
        shard.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
        last = records[-1] if records else None
        done = last is not None and is_done(last["status"])
        counters = _spending(ctx, attempts.spent)
        if last is not None and last["status"] != "cancelled":
            counters |= {"rows_done": 1, "rows_ok": int(done), "rows_error": int(not done)}
            if last["resolved"] is not None:
                counters["rows_resolved"] = int(last["resolved"])
            await announce(ctx, *_told(last, attempts.spent, n))
        return UnitOutcome(
            counters=counters,
            file=shard,
            complete=(last is not None and last["status"] != "cancelled" and not attempts.unjudged),
            files={f"{INFER_LOGS}/{log_file.name}": log_file},
        )

    async def _named(self, ctx: Ctx, endpoint: Endpoint, tasks: Sequence[Task]) -> Endpoint:
        """The checked endpoint, under the name that it has for the model."""
        found = await self._parts.check(ctx, endpoint, tasks)
        if found.model != endpoint.model:
            said = (
                f"llm_model: the server at {self._job.llm_base_url} has no {_bare(endpoint)}, and"
                f" is asked for {_bare(found)}"
            )
            await asyncio.to_thread(ctx.event, "warning", "model.name", said, None)
        return found

    async def _endpoint(self, ctx: Ctx) -> Endpoint:
        found = await self._parts.endpoint(ctx)
        model = (await asyncio.to_thread(ctx.load_state)).get(_MODEL)
        return found if model is None else dataclasses.replace(found, model=model)

    async def _host(self, ctx: Ctx, endpoint: Endpoint) -> Host:
        return await ctx.resources.get(
            "swe-agent:host", lambda: self._parts.host(ctx, endpoint), lambda host: host.close()
        )

    async def _metadata(self, ctx: Ctx, agent: Mapping[str, str]) -> dict[str, Any]:
        """``agent``: the versions of what its agents are made of."""
        started = (await asyncio.to_thread(ctx.load_state)).get(_STARTED)
        metadata = run_metadata(
            self._job,
            agent_config={"spider": importlib.metadata.version("spider-distill")},
            start_time=datetime.datetime.fromisoformat(started or _now()),
            git_commit=await asyncio.to_thread(spider_commit),
        )
        metadata["details"] |= agent
        return metadata

    def _transcript(self, ctx: UnitCtx, name: str, past: Past) -> Transcript:
        """The log of an instance, with what is known of its earlier attempts."""
        transcript = Transcript(ctx.scratch / name)
        earlier = ctx.artifact(f"{INFER_LOGS}/{name}")
        told = past.committed if earlier is not None else 0
        transcript.take_over(earlier, past.records[told:])
        return transcript

    # -- how many at once ------------------------------------------------------------

    def _enter(self, ctx: UnitCtx) -> None:
        self._live += 1
        self._waiting.append(ctx)
        self._make_room()

    def _leave(self, ctx: UnitCtx) -> None:
        self._live -= 1
        if ctx in self._waiting:
            self._waiting.remove(ctx)
        self._make_room()

    def _make_room(self) -> None:
        """Have the runner ask for another instance while it may have one more at work."""
        if self._live < self._parts.slots:
            for ctx in self._waiting:
                ctx.draining()
            self._waiting.clear()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _spending(ctx: UnitCtx, spent: Spent) -> Counters:
    counters: Counters = {
        "prompt_tokens": spent.prompt + spent.attempt_prompt,
        "completion_tokens": spent.completion + spent.attempt_completion,
    }
    # A cost that is unknown must not leave room for others under a cap.
    capped = ctx.grant is not None or ctx.job.max_budget_per_instance is not None
    cost = spent.charge if capped else spent.total
    if cost is not None:
        counters["cost_usd"] = cost
    return counters


def _told(record: Mapping[str, Any], spent: Spent, n: int) -> tuple[str, str, dict[str, Any]]:
    """The event that an instance has ended."""
    status, error = record["status"], record["error"]
    words = [f"{record['instance_id']}: {status.replace('_', ' ')}"]
    words.append(f"{record['metrics'].get('turns', 0)} turns")
    if spent.total is not None:
        words.append(f"${spent.total:.2f}")
    if record["resolved"] is not None:
        words.append("resolved" if record["resolved"] else "not resolved")
    if error:
        words.append(str(error)[:200])
    data = {
        "instance": record["instance_id"], "n": n, "status": status, "error": error,
        "attempt": record["attempt"], "resolved": record["resolved"],
    }  # fmt: skip
    return ("instance.ended", ", ".join(words), data)


def _bare(endpoint: Endpoint) -> str:
    """The model's name as the endpoint is sent it."""
    return endpoint.model.removeprefix("openai/")
