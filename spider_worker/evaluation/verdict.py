"""From what the tests said to resolved or not, and the report that says why."""

from __future__ import annotations

__all__ = ["Group", "Report", "judge_run", "patch_digest"]

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

from spider_worker.evaluation.harness import SuiteRun
from spider_worker.evaluation.statuses import Results, Status
from spider_worker.swe_tasks.base import Task

_HARMLESS = frozenset({Status.PASSED, Status.SKIPPED, Status.XFAIL})


@dataclasses.dataclass(frozen=True)
class Group:
    """The tests of one list of the task; ``missing`` are those of ``failed`` of which nothing was
    said."""

    passed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """A judgement. ``resolved`` None: nothing can be said of the patch, for a reason that is not
    the patch's (``error_eval``, ``invalid_task``, ``error``).

    ``apply_method`` is what put the patch in (None: nothing did, or none was tried); ``policy`` the
    rules by which edits were taken back, and ``restored`` the files whose edits were. ``flaky`` are
    tests that did not say the same in every run of the same tree. ``exit_code`` is the test
    command's, None where it has none; ``seconds`` the time of all runs together.
    """

    resolved: bool | None
    patch_sha256: str = ""
    policy: str = ""
    empty_generation: bool = False
    failed_apply_patch: bool = False
    error_eval: bool = False
    test_timeout: bool = False
    invalid_task: bool = False
    apply_method: str | None = None
    restored: tuple[str, ...] = ()
    fail_to_pass: Group | None = None
    pass_to_pass: Group | None = None
    flaky: tuple[str, ...] = ()
    runs: int = 0
    exit_code: int | None = None
    seconds: float = 0.0
    error: str | None = None
    log: str = dataclasses.field(default="", repr=False)

    @property
    def settled(self) -> bool:
        """False where another evaluation may well say something else."""
        return self.resolved is not None or self.invalid_task

    def to_json(self) -> dict[str, Any]:
        """As it stands in a record. The tests are under ``tests`` (null: they did not run); the log
        is not part of it."""
        report = dataclasses.asdict(self)
        del report["log"]
        groups = {name: report.pop(name) for name in ("fail_to_pass", "pass_to_pass")}
        tests = {name: {k: list(v) for k, v in g.items()} for name, g in groups.items() if g}
        for name in ("restored", "flaky"):
            report[name] = list(report[name])
        return {**report, "seconds": round(self.seconds, 3), "tests": tests or None}


def patch_digest(patch: str) -> str:
    """What tells one patch from another."""
    return hashlib.sha256(patch.encode("utf-8", "surrogatepass")).hexdigest()


def judge_run(task: Task, run: SuiteRun) -> Report:
    """Resolved where every FAIL_TO_PASS test passed and every PASS_TO_PASS test passed, was skipped
    or failed as expected. A test of which nothing was said has failed; where no test said anything
    there is no answer; a run past its time is the patch's doing, since the task's own solution
    kept to it (``judge``)."""
    report = Report(resolved=None, runs=1, exit_code=run.exit_code, seconds=run.seconds)
    if run.timed_out:
        said = "the tests ran past their time"
        return dataclasses.replace(report, resolved=False, test_timeout=True, error=said)
    if run.fault is not None:
        return dataclasses.replace(report, error_eval=True, error=run.fault, log=run.log)
    needed = _group(run.results, task.fail_to_pass, frozenset({Status.PASSED}))
    kept = _group(run.results, task.pass_to_pass, _HARMLESS)
    return dataclasses.replace(
        report,
        resolved=bool(needed.passed) and not needed.failed and not kept.failed,
        fail_to_pass=needed,
        pass_to_pass=kept,
        log=run.log,
    )


def _group(results: Results, tests: Iterable[str], good: frozenset[Status]) -> Group:
    passed: list[str] = []
    failed: list[str] = []
    missing: list[str] = []
    for test in tests:
        status = results.status_of(test)
        (passed if status in good else failed).append(test)
        if status is None:
            missing.append(test)
    return Group(tuple(passed), tuple(failed), tuple(missing))
