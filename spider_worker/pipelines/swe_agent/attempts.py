"""One instance, until it has an outcome: an attempt in a fresh workspace, and another where what
went wrong was not the agent's doing.

The retries of an instance are made here, ``max_retries`` of them, whichever worker has it; those
of a call of the model are the agent's SDK's.
"""

from __future__ import annotations

__all__ = ["Attempts", "instruction"]

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from spider_sdk.config.model import SweConfig
from spider_sdk.errors import AuthError, WorkspaceError
from spider_worker.agents.episode import Heard
from spider_worker.agents.proxy import Ticket
from spider_worker.pipelines.base import UnitContext
from spider_worker.pipelines.swe_agent.journal import Journal, Past
from spider_worker.pipelines.swe_agent.parts import Host, Judging
from spider_worker.swe_tasks.base import Task
from spider_worker.trajectories.record import build, is_done, judged
from spider_worker.workspaces.base import Box, Workspace
from spider_worker.workspaces.repository import prepare, take_patch

log = logging.getLogger(__name__)

#: Ends that say nothing about the agent. One that ran out of time has had what a retry would have.
RETRIED: Final = frozenset({"llm_error", "workspace_error", "agent_error"})
#: Calls of the model beyond its iterations: for a condenser, and those that are repeated.
_SPARE_CALLS: Final = 3
#: Columns of data sets that give the answer away; they stay with the judge.
_SECRET: Final = frozenset({"patch", "gold_patch", "test_patch", "bug_patch"})


def instruction(task: Task, path: str) -> str:
    """What the agent is asked."""
    return (
        f"The repository {task.repo} is checked out in {path}. Something in it is wrong:\n\n"
        f"<issue>\n{task.problem_statement.strip()}\n</issue>\n\n"
        "Find the cause in the source code and mend it, with as small a change as does it. The"
        " tests that judge the result are not shown to you: leave existing tests as they are."
        " Reproduce the fault first where you can, and run what tests there are when you are done."
        " There is nobody to ask: decide by yourself, and finish when it works."
    )


class Attempts:
    """An instance's attempts in one claim of its unit."""

    def __init__(
        self,
        ctx: UnitContext[SweConfig],
        task: Task,
        n: int,
        *,
        workspace: Workspace,
        host: Host,
        judge: Judging | None,
        journal: Journal,
        past: Past,
        metadata: Mapping[str, Any],
        log_file: Path,
        report: Callable[[Spent], None],
    ) -> None:
        self._ctx = ctx
        self._task = task
        self._n = n
        self._workspace = workspace
        self._host = host
        self._judge = judge
        self._journal = journal
        self._metadata = metadata
        self._log = log_file
        self._report = report
        self.records: list[dict[str, Any]] = list(past.records)
        self.number = past.attempt
        self._committed = past.committed
        self._before = past.records[past.committed - 1]["attempt"] if past.committed else 0
        self.spent = Spent()
        for record in past.records:
            self.spent.add_record(record)
        if past.unfinished is not None:
            self._close_unfinished(past)

    async def run(self) -> None:
        """Attempt it until there is an outcome, the retries are used up or the job is cancelled.
        ``records`` has one entry an attempt afterwards. Raises AuthError where the model's
        endpoint refuses the key."""
        while not self._settled():
            self.number += 1
            self._journal.begin(self.number)
            record = await self._attempt()
            self._journal.end(record)
            self.records.append(record)
            self.spent.settle()

    def _settled(self) -> bool:
        if self._ctx.cancelled:
            return True
        if not self.records:
            return False
        status = self.records[-1]["status"]
        if len(self.records) == self._committed or status == "cancelled":
            return is_done(status)  # a job that is retried tries again whatever did not work out
        made = self.number - self._before
        return status not in RETRIED or made > self._ctx.job.max_retries

    def _close_unfinished(self, past: Past) -> None:
        """What was under way when the last worker was lost becomes an attempt that failed."""
        assert past.unfinished is not None
        self.spent.now(past.cost, *past.tokens)
        heard = past.unfinished
        heard.status, heard.error = "agent_error", "its worker was lost while it was at work"
        record = self._record(heard, None, self.spent)
        self._journal.end(record)
        self.records.append(record)
        self.spent.settle()

    async def _attempt(self) -> dict[str, Any]:
        """One attempt. Whatever goes wrong with the place is an end like others."""
        heard = Heard()
        patch: str | None = None
        try:
            async with self._workspace.open(self._task) as box:
                await prepare(box, self._task)
                heard = await self._episode(box)
                if heard.messages or heard.history:
                    patch = await take_patch(box)
        except WorkspaceError as error:
            log.warning("%s: %s", self._task.instance_id, error.message)
            heard.status, heard.error = "workspace_error", error.message
        if heard.status == "finished" and not (patch or "").strip():
            heard.status = "empty_patch"
        record = self._record(heard, patch, self.spent)
        if self._judge is not None and heard.status not in (*RETRIED, "cancelled"):
            report = await self._judge(self._task, patch)
            return judged(record, report.get("resolved"), report)
        return record

    async def _episode(self, box: Box) -> Heard:
        job, ctx = self._ctx.job, self._ctx
        cap = _least(job.max_budget_per_instance, self._grant())
        calls = _SPARE_CALLS * job.max_iterations
        ticket = self._host.ticket(max_calls=calls, max_cost=cap)
        request = {
            "instruction": instruction(self._task, box.path),
            "max_iterations": job.max_iterations,
            "max_budget": cap,
            "condenser": _condenser(job.condenser),
        }

        def hear(line: Mapping[str, Any], heard: Heard) -> None:
            self._journal.hear(line)
            if line["op"] == "metrics":
                self._spend(ticket, heard)

        heard = await self._host.run(
            box,
            request,
            ticket=ticket,
            log=self._log,
            timeout=job.timeout_seconds,
            listener=hear,
            stop=ctx.wait_cancelled,
        )
        self._spend(ticket, heard)
        if ticket is not None and ticket.refused and not ticket.answers:
            raise AuthError(
                f"the model's endpoint refused the key of {job.llm_model}: {ticket.refused}"
            )
        return heard

    def _grant(self) -> float | None:
        """Of what this claim may spend, what its earlier attempts left."""
        if self._ctx.grant is None:
            return None
        return max(self._ctx.grant - (self.spent.this_claim or 0.0), 0.0)

    def _spend(self, ticket: Ticket | None, heard: Heard) -> None:
        if ticket is not None:
            self.spent.now(ticket.cost, ticket.prompt_tokens, ticket.completion_tokens)
        else:
            usage = heard.metrics.get("accumulated_token_usage") or {}
            cost = heard.metrics.get("accumulated_cost") or None
            self.spent.now(cost, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))
        self.spent.turns = heard.turns
        self._journal.spend(
            self.spent.attempt_cost, self.spent.attempt_prompt, self.spent.attempt_completion
        )
        self._report(self.spent)

    def _record(self, heard: Heard, patch: str | None, spent: Spent) -> dict[str, Any]:
        task = self._task
        metrics = {
            **heard.metrics,
            "accumulated_cost": spent.attempt_cost,
            "accumulated_token_usage": {
                **(heard.metrics.get("accumulated_token_usage") or {}),
                "prompt_tokens": spent.attempt_prompt,
                "completion_tokens": spent.attempt_completion,
            },
            "turns": heard.turns,
            "seconds": heard.seconds,
        }
        return build(
            instance_id=task.instance_id,
            status=heard.status or "agent_error",
            instance={key: value for key, value in task.row.items() if key not in _SECRET},
            metadata=self._metadata,
            git_patch=patch,
            instruction=instruction(task, "/testbed"),
            history=heard.history,
            metrics=metrics,
            error=heard.error,
            attempt=self.number,
            n=self._n,
            messages=heard.messages,
            tools=heard.tools,
        )


@dataclasses.dataclass
class Spent:
    """Dollars (None: unknown) and tokens: of earlier attempts, and of the one under way."""

    cost: float | None = 0.0
    prompt: int = 0
    completion: int = 0
    this_claim: float | None = 0.0
    attempt_cost: float | None = 0.0
    attempt_prompt: int = 0
    attempt_completion: int = 0
    turns: int = 0  #: of the attempt under way

    def now(self, cost: float | None, prompt: int, completion: int) -> None:
        self.attempt_cost, self.attempt_prompt, self.attempt_completion = cost, prompt, completion

    def settle(self) -> None:
        """The attempt has ended: it counts among the earlier ones."""
        self.cost = _sum(self.cost, self.attempt_cost)
        self.this_claim = _sum(self.this_claim, self.attempt_cost)
        self.prompt += self.attempt_prompt
        self.completion += self.attempt_completion
        self.now(0.0, 0, 0)

    def add_record(self, record: Mapping[str, Any]) -> None:
        metrics = record["metrics"]
        usage = metrics.get("accumulated_token_usage") or {}
        self.cost = _sum(self.cost, metrics.get("accumulated_cost"))
        self.prompt += usage.get("prompt_tokens", 0)
        self.completion += usage.get("completion_tokens", 0)

    @property
    def total(self) -> float | None:
        return _sum(self.cost, self.attempt_cost)


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def _least(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return min(known) if known else None


def _condenser(wanted: object) -> bool | dict[str, Any]:
    return dict(wanted) if isinstance(wanted, Mapping) else bool(wanted)
