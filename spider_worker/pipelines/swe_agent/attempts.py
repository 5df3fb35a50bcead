"""One instance, until it has an outcome: an attempt in a fresh workspace, and another where what
went wrong was not the agent's doing.

The retries of an instance are made here, ``max_retries`` of them, whichever worker has it; those
of a call of the model are the agent's SDK's.
"""

from __future__ import annotations

__all__ = ["Attempts", "instruction"]

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from spider_sdk.config.model import SweConfig
from spider_sdk.errors import AuthError, EngineUnavailable, WorkspaceError
from spider_worker.agents.episode import Heard
from spider_worker.agents.proxy import Ticket
from spider_worker.evaluation.standing import judgeable
from spider_worker.evaluation.verdict import Report
from spider_worker.pipelines.base import UnitContext
from spider_worker.pipelines.calls import announce
from spider_worker.pipelines.swe_agent.journal import Journal, Past
from spider_worker.pipelines.swe_agent.parts import Host, Judging
from spider_worker.pipelines.swe_agent.spending import Spent
from spider_worker.pipelines.swe_agent.transcript import Transcript
from spider_worker.swe_tasks.base import Task
from spider_worker.trajectories.record import Record, build, is_done, judged
from spider_worker.workspaces.base import Box, Workspace
from spider_worker.workspaces.repository import UnusablePatch, prepare, take_patch

log = logging.getLogger(__name__)

#: Ends that say nothing about the agent. One that ran out of time has had what a retry would have.
RETRIED: Final = frozenset({"llm_error", "workspace_error", "agent_error"})
_LOST: Final = "its worker was lost while it was at work"
#: Attempts that were lost with their workers and do not count among ``max_retries``.
_MOST_LOST: Final = 5
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
        transcript: Transcript,
        turn: asyncio.Semaphore,
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
        self._transcript = transcript
        self._turn = turn
        self._report = report
        self.records: list[dict[str, Any]] = list(past.records)
        self.number = past.attempt
        self._earlier = past.earlier
        self._before = past.records[past.earlier - 1]["attempt"] if past.earlier else 0
        self.spent = Spent()
        self._heard = Heard()
        for number, record in enumerate(past.records):
            self.spent.add_record(record, this_life=number >= past.earlier)
        if past.unfinished is not None:
            self._close_unfinished(past)
        if past.life != ctx.life:
            self._begin_life()

    async def run(self) -> None:
        """Attempt it until there is an outcome, the retries or the money are used up or the job is
        cancelled, and have the last attempt judged. ``records`` has one entry an attempt
        afterwards. Raises AuthError where the model's endpoint refuses the key."""
        while not self._settled():
            if len(self.records) > self._earlier:
                await self._tell_of_retry(self.records[-1])
            self.number += 1
            self.spent.allowed = self._left()
            self._journal.begin(self.number, self.spent.allowed)
            self._transcript.begin(self.number)
            record = await self._attempt()
            self._transcript.end(record)
            self._keep(record)
        await self._judge_last()

    @property
    def unjudged(self) -> bool:
        """Whether the last attempt is still to be judged: the job was cancelled first."""
        if self._judge is None or not self.records:
            return False
        last = self.records[-1]
        return last["report"] is None and judgeable(Record(last))

    def _settled(self) -> bool:
        if self._ctx.cancelled:
            return True
        if not self.records:
            return False
        status = self.records[-1]["status"]
        if len(self.records) == self._earlier or status == "cancelled":
            return is_done(status)  # a job that is retried tries again whatever did not work out
        # A worker that goes is not the instance's doing; one that always goes with it may be.
        lost = sum(record["error"] == _LOST for record in self.records[self._earlier :])
        made = self.number - self._before - min(lost, _MOST_LOST)
        return status not in RETRIED or made > self._ctx.job.max_retries or self._left() == 0.0

    async def _tell_of_retry(self, record: Mapping[str, Any]) -> None:
        name, status, error = self._task.instance_id, record["status"], record["error"]
        said = f"{name}: {status.replace('_', ' ')}, tried again"
        if error:
            said += f": {str(error)[:300]}"
        at = {"instance": name, "n": self._n, "attempt": record["attempt"], "status": status}
        await announce(self._ctx, "instance.retrying", said, {**at, "error": error})

    def _keep(self, record: dict[str, Any]) -> None:
        self._journal.end(record)
        self.records.append(record)
        self.spent.settle()

    def _begin_life(self) -> None:
        """Retries and the instance's cap are each life's of the job, and begin anew."""
        self._journal.live(self._ctx.life)
        self._earlier, self._before = len(self.records), self.number
        self.spent.begin_life()

    def _close_unfinished(self, past: Past) -> None:
        """What was under way when the last worker was lost becomes an attempt that failed."""
        assert past.unfinished is not None
        self.spent.allowed = past.allowed
        self.spent.now(past.cost, *past.tokens)
        heard = past.unfinished
        heard.status, heard.error = "agent_error", _LOST
        if past.life == self._ctx.life:
            self._note_unpaid(heard)
        record = self._record(heard, None)
        self._transcript.replay(record)
        self._keep(record)

    async def _attempt(self) -> dict[str, Any]:
        """One attempt. Whatever goes wrong with the place is an end like others; what was heard
        until then is kept."""
        self._heard, patch = Heard(), None
        try:
            async with self._workspace.open(self._task) as box:
                await prepare(box, self._task, turn=self._turn)
                await self._episode(box)
                patch = await self._take(box)
        except WorkspaceError as error:
            log.warning("%s: %s", self._task.instance_id, error.message)
            heard = self._heard
            # An agent that ran out of something has, also where its patch cannot be had.
            if heard.status in (None, "finished") and patch is None:
                heard.status = "workspace_error"
            if patch is None:
                heard.error = "; ".join(filter(None, (heard.error, error.message)))
        heard = self._heard
        if heard.status == "finished" and not (patch or "").strip():
            heard.status = "empty_patch"
        self._note_unpaid(heard)
        return self._record(heard, patch)

    async def _take(self, box: Box) -> str | None:
        """What the agent changed; None where it never began, or changed more than can be kept,
        which another attempt would not mend."""
        heard = self._heard
        if not (heard.messages or heard.history):
            return None
        try:
            return await take_patch(box)
        except UnusablePatch as error:
            if heard.status == "finished":
                heard.status = "unusable_patch"
            heard.error = "; ".join(filter(None, (heard.error, error.message)))
            return None

    async def _judge_last(self) -> None:
        """Have the last record judged, which is kept whatever becomes of that."""
        if not self.unjudged:
            return
        record = self.records[-1]
        name = self._task.instance_id
        at = {"instance": name, "n": self._n}
        await announce(self._ctx, "instance.judging", f"{name}: its tests run", at)
        try:
            report = await self._report_on(record["test_result"]["git_patch"])
        except (EngineUnavailable, WorkspaceError) as error:
            log.warning("%s could not be judged: %s", self._task.instance_id, error.message)
            report = Report(resolved=None, error_eval=True, error=error.message).to_json()
        if report is not None:
            self._journal.verdict(report)
            self._transcript.verdict(report)
            self.records[-1] = judged(record, report.get("resolved"), report)

    async def _report_on(self, patch: str | None) -> Mapping[str, Any] | None:
        """None where the job is cancelled first."""
        assert self._judge is not None
        if self._ctx.cancelled:
            return None
        judging = asyncio.ensure_future(self._judge(self._task, patch))
        stopping = asyncio.ensure_future(self._ctx.wait_cancelled())
        try:
            await asyncio.wait([judging, stopping], return_when=asyncio.FIRST_COMPLETED)
            return judging.result() if judging.done() else None
        finally:
            judging.cancel()
            stopping.cancel()
            await asyncio.gather(judging, stopping, return_exceptions=True)

    async def _episode(self, box: Box) -> None:
        """``_heard`` is what was heard of it, also where this raises WorkspaceError."""
        job, ctx = self._ctx.job, self._ctx
        cap = self.spent.allowed
        calls = _SPARE_CALLS * job.max_iterations
        ticket = self._host.ticket(max_calls=calls, max_cost=cap)
        request = {
            "instruction": instruction(self._task, box.path),
            "max_iterations": job.max_iterations,
            "max_budget": cap,
            "condenser": _condenser(job.condenser),
        }

        def hear(line: Mapping[str, Any], heard: Heard) -> None:
            self._heard = heard
            self._journal.hear(line)
            self._transcript.hear(line)
            if line["op"] == "metrics":
                self._spend(ticket, heard)

        self._heard = await self._host.run(
            box,
            request,
            ticket=ticket,
            log=self._transcript.printed,
            timeout=job.timeout_seconds,
            listener=hear,
            stop=ctx.wait_cancelled,
        )
        self._spend(ticket, self._heard)
        if ticket is not None and ticket.refused and not ticket.answers:
            raise AuthError(
                f"the model's endpoint refused the key of {job.llm_model}: {ticket.refused}"
            )

    def _left(self) -> float | None:
        """Dollars that another attempt may cost; None: there is no cap."""
        return self.spent.left(self._ctx.job.max_budget_per_instance, self._ctx.grant)

    def _spend(self, ticket: Ticket | None, heard: Heard) -> None:
        if ticket is not None:
            self.spent.now(ticket.cost, ticket.prompt_tokens, ticket.completion_tokens)
        else:
            usage = heard.metrics.get("accumulated_token_usage") or {}
            # Nothing at all is also what is counted where nobody knows the price.
            unpriced = None if self.spent.allowed is None else 0.0
            cost = heard.metrics.get("accumulated_cost") or unpriced
            self.spent.now(cost, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))
        self.spent.turns = heard.turns
        self._journal.spend(
            self.spent.attempt_cost, self.spent.attempt_prompt, self.spent.attempt_completion
        )
        self._report(self.spent)

    def _note_unpaid(self, heard: Heard) -> None:
        """What would be tried again has ended where there is nothing to pay that with."""
        cap = self._ctx.job.max_budget_per_instance
        if heard.status in RETRIED and self.spent.left(cap, None) == 0.0:
            used_up = f"the ${cap:g} for an instance are used up"
            heard.status, heard.error = "max_budget", f"{used_up}; {heard.error}"

    def _record(self, heard: Heard, patch: str | None) -> dict[str, Any]:
        task, spent = self._task, self.spent
        metrics = {
            **heard.metrics,
            "accumulated_cost": spent.attempt_cost,
            "max_budget_per_task": spent.allowed,
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


def _condenser(wanted: object) -> bool | dict[str, Any]:
    return dict(wanted) if isinstance(wanted, Mapping) else bool(wanted)
