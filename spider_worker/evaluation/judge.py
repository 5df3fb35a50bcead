"""Judge a patch: a fresh box for each run of the tests, and the task's own proof before it.

A task can tell a right patch from a wrong one only where its own solution passes the tests and the
state without it does not. That is found out once for each task, in the very way in which patches
are judged, and kept where it is so: where it is not, something of this machine may be the cause,
and the next evaluation looks again. A patch that fails is run again: what passes then was flaky.
"""

from __future__ import annotations

__all__ = ["GoldCheck", "Judge"]

import asyncio
import dataclasses
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from spider_sdk.errors import WorkspaceError
from spider_worker.evaluation import policy
from spider_worker.evaluation.harness import run_suite
from spider_worker.evaluation.patches import Applied, apply_patch, apply_test_patch
from spider_worker.evaluation.verdict import Group, Report, judge_run, patch_digest
from spider_worker.sinks.atomic import atomic_path
from spider_worker.swe_tasks.base import Task
from spider_worker.workspaces.base import Workspace
from spider_worker.workspaces.repository import prepare

log = logging.getLogger(__name__)

#: Changes when tests are run or read in another way: what was found out before is then void.
_VERSION: Final = 2


@dataclasses.dataclass(frozen=True)
class GoldCheck:
    """``valid`` None: it could not be found out (``reason`` says why), and is not kept. ``flaky``
    are tests that failed with the task's own solution and passed when they ran again."""

    valid: bool | None
    reason: str | None = None
    flaky: tuple[str, ...] = ()


class Judge:
    """``timeout`` is in seconds, for one run of a task's tests; ``reruns`` how often a failure is
    run again at most; ``cache`` the folder in which the checks of tasks are kept (None: they are
    kept as long as this object), from which ``fresh`` takes none; ``network`` what a task's set-up
    commands have. The tests themselves have none."""

    def __init__(
        self,
        workspace: Workspace,
        *,
        timeout: float = 1800.0,
        reruns: int = 2,
        cache: Path | None = None,
        fresh: bool = False,
        network: bool = False,
    ) -> None:
        self._workspace = workspace
        self._timeout = timeout
        self._reruns = reruns
        self._cache = cache
        self._fresh = fresh
        self._network = network
        self._checks: dict[str, GoldCheck] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def judge(self, task: Task, patch: str | None) -> Report:
        """A report on ``patch`` (None and blank: empty). What goes wrong with boxes is in it, with
        ``resolved`` None. Raises EngineUnavailable where there can be no box at all."""
        report = await self._judge(task, patch or "")
        return dataclasses.replace(
            report, patch_sha256=patch_digest(patch or ""), policy=policy.NAME
        )

    async def _judge(self, task: Task, patch: str) -> Report:
        if not patch.strip():
            return Report(resolved=False, empty_generation=True)
        check = await self.check(task)
        if check.valid is None:
            return Report(resolved=None, error_eval=True, error=check.reason)
        if not check.valid:
            return Report(resolved=None, invalid_task=True, error=check.reason)
        return await self._attempts(task, patch)

    async def check(self, task: Task) -> GoldCheck:
        """Whether the task can tell a right patch from a wrong one."""
        key = self._key(task)
        async with self._locks[key]:  # several runs of one task wait for the one check
            known = self._checks.get(key) or await asyncio.to_thread(self._load, task, key)
            if known is None:
                known = await self._find_out(task)
                if known.valid:
                    await asyncio.to_thread(self._save, task, key, known)
            if known.valid is not None:
                self._checks[key] = known
            return known

    async def _find_out(self, task: Task) -> GoldCheck:
        if not task.fail_to_pass:
            return GoldCheck(False, "no test of the task fails without a solution (FAIL_TO_PASS)")
        solution = task.bug_patch if task.gold_patch is None else task.gold_patch
        if not solution.strip():
            return GoldCheck(False, "the task has no solution of its own to check it by")
        gold = await self._attempts(task, solution, reverse=task.gold_patch is None)
        if not gold.resolved:
            # A machine with too much to do lets the right solution run past its time as well.
            undecided = gold.test_timeout or (gold.resolved is None and not gold.invalid_task)
            reason = f"the task's own solution does not pass: {_why(gold)}"
            return GoldCheck(None if undecided else False, reason)
        fault = await self._once(task, None)
        if fault.resolved is None and fault.runs == 0:
            return GoldCheck(None, f"the state without a solution cannot be tested: {_why(fault)}")
        if fault.resolved or (fault.fail_to_pass and not fault.fail_to_pass.failed):
            return GoldCheck(False, "every FAIL_TO_PASS test passes without a solution")
        return GoldCheck(True, flaky=gold.flaky)

    async def _attempts(self, task: Task, patch: str, *, reverse: bool = False) -> Report:
        """Run once, and again while it fails for a reason that may go away."""
        reports = [await self._once(task, patch, reverse=reverse)]
        while len(reports) <= self._reruns and _may_change(reports):
            reports.append(await self._once(task, patch, reverse=reverse))
        return _together(reports)

    async def _once(self, task: Task, patch: str | None, *, reverse: bool = False) -> Report:
        """One run in a box of its own; ``patch`` None: on the state without a solution. The
        boundary of boxes: what fails there is a report."""
        try:
            async with self._workspace.open(task) as box:
                await prepare(box, task, network=self._network)
                applied: Applied | None = None
                if patch is not None:
                    applied = await apply_patch(box, task, patch, reverse=reverse)
                    if applied.method is None:
                        return Report(resolved=False, failed_apply_patch=True, error=applied.said)
                misfit = await apply_test_patch(box, task)
                if misfit is not None:
                    said = f"the task's own tests do not fit: {misfit}"
                    return Report(resolved=None, invalid_task=True, error=said)
                run = await run_suite(box, task, timeout=self._timeout)
        except (WorkspaceError, OSError) as error:
            log.warning("%s could not be judged: %s", task.instance_id, error)
            return Report(resolved=None, error_eval=True, error=str(error))
        report = judge_run(task, run)
        if applied is None:
            return report
        return dataclasses.replace(report, apply_method=applied.method, restored=applied.restored)

    # -- what is kept --------------------------------------------------------------

    def _key(self, task: Task) -> str:
        parts = dataclasses.asdict(dataclasses.replace(task, row={}, problem_statement=""))
        parts["judge"] = [_VERSION, policy.NAME, self._workspace.kind, self._timeout]
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def _file(self, task: Task, key: str) -> Path | None:
        """None where nothing is kept: a folder that is taken as it stands may be another one
        tomorrow."""
        if self._cache is None or (task.base_commit is None and task.origin.kind != "image"):
            return None
        return self._cache / f"{key}.json"

    def _load(self, task: Task, key: str) -> GoldCheck | None:
        file = self._file(task, key)
        if file is None or self._fresh:
            return None
        try:
            kept = json.loads(file.read_bytes())
            return GoldCheck(True, flaky=tuple(kept["flaky"])) if kept["valid"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _save(self, task: Task, key: str, check: GoldCheck) -> None:
        file = self._file(task, key)
        if file is None:
            return
        kept = {"instance_id": task.instance_id, **dataclasses.asdict(check)}
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as temporary:
            temporary.write_text(json.dumps(kept))


def _may_change(reports: Sequence[Report]) -> bool:
    last = reports[-1]
    if last.resolved or last.failed_apply_patch or last.runs == 0:
        return False
    # A run past its time is dear: it has one more chance.
    return sum(report.test_timeout for report in reports) < 2


def _together(reports: Sequence[Report]) -> Report:
    """Of several runs of the same tree: resolved where one was, and the tests that did not say the
    same in all of them."""
    decided = [report for report in reports if report.resolved is not None]
    best = next((report for report in decided if report.resolved), (decided or reports)[0])
    passed = [_tests(report, "passed") for report in reports if report.fail_to_pass]
    failed = [_tests(report, "failed") for report in reports if report.fail_to_pass]
    flaky = set().union(*passed) & set().union(*failed)
    return dataclasses.replace(
        best,
        flaky=tuple(sorted(flaky)),
        runs=sum(report.runs for report in reports),
        seconds=sum(report.seconds for report in reports),
    )


def _tests(report: Report, which: str) -> set[str]:
    groups: list[Group] = [g for g in (report.fail_to_pass, report.pass_to_pass) if g]
    return {test for group in groups for test in getattr(group, which)}


def _why(report: Report) -> str:
    if report.failed_apply_patch:
        return f"it does not apply ({report.error})"
    failed = sorted(_tests(report, "failed"))
    if not failed:
        return report.error or "no reason was given"
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    return f"{', '.join(failed[:3])}{more} failed"
