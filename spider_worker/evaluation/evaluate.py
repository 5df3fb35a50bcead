"""Judge the patches of an ``output.jsonl``, and write into it what came of them."""

from __future__ import annotations

__all__ = ["Judged", "Summary", "evaluate_file", "with_report"]

import asyncio
import collections
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spider_sdk.errors import SpiderError
from spider_worker.evaluation import policy
from spider_worker.evaluation.judge import Judge
from spider_worker.evaluation.predictions import IMPORTED
from spider_worker.evaluation.standing import judgeable, known_verdict
from spider_worker.evaluation.verdict import Report, patch_digest
from spider_worker.swe_tasks.base import Task
from spider_worker.trajectories.output_file import read_index, rewrite
from spider_worker.trajectories.record import Record
from spider_worker.workspaces.base import Workspace

#: Instance, independent run (from 0), attempt (from 1), digest of the patch.
_Line = tuple[str, int, int, str]


@dataclasses.dataclass(frozen=True)
class Judged:
    """One record's report; ``n`` counts independent runs of an instance from 0, ``attempt`` the
    tries of such a run from 1."""

    instance_id: str
    n: int
    attempt: int
    report: Report


@dataclasses.dataclass(frozen=True)
class Summary:
    """What an evaluation did. ``skipped`` counts records that were judged before, ``unjudged``
    those whose run was kept from its end (``judgeable``), ``undecided`` those of which nothing can
    be said (``invalid`` among them: their task is at fault), ``kept`` those of these that have an
    earlier verdict on the same patch, which stays; ``unknown`` are the ids of records that no task
    has, ``torn`` the bytes of a last line that was never finished: no record."""

    judged: int = 0
    resolved: int = 0
    unresolved: int = 0
    undecided: int = 0
    invalid: int = 0
    flaky: int = 0
    kept: int = 0
    skipped: int = 0
    unjudged: int = 0
    unknown: tuple[str, ...] = ()
    torn: int = 0


@dataclasses.dataclass(frozen=True)
class _Work:
    """One record that has to be judged."""

    line: _Line
    patch: str
    before: bool | None  # a verdict on the same patch


async def evaluate_file(
    path: Path,
    tasks: Mapping[str, Task],
    workspace: Workspace,
    *,
    num_workers: int = 1,
    timeout: float = 1800.0,  # noqa: ASYNC109 - one for each run of tests
    reruns: int = 2,
    cache: Path | None = None,
    network: bool = False,
    force: bool = False,
    interval: float = 30.0,
    on_result: Callable[[Judged], None] | None = None,
) -> Summary:
    """Judge the record that counts of each run in ``path``, ``num_workers`` at a time, by the
    ``tasks`` of their ids.

    The file is replaced as a whole now and then (``interval`` in seconds, longer where that takes
    long) and at the end, whatever the end is; lines that others add meanwhile stay. Records with a
    settled report on the same patch, a public harness's too, are left out, unless ``force``, which
    also has every task checked anew; those that are not ``judgeable`` always are. A verdict on the
    same patch is never replaced by none. ``timeout``, ``reruns``, ``cache`` and ``network`` are the
    judge's (``Judge``).

    Raises EngineUnavailable where boxes cannot be had, UsageError for a line that is no record,
    FileNotFoundError where there is no file.
    """
    work, found = await asyncio.to_thread(_plan, path, tasks, force)
    if work:
        await workspace.check()
    judge = Judge(
        workspace, timeout=timeout, reruns=reruns, cache=cache, fresh=force, network=network
    )
    reports: dict[_Line, Report] = {}
    kept = 0
    writer = _Writer(path, interval)
    queue = collections.deque(work)

    async def serve() -> None:
        nonlocal kept
        while queue:
            one = queue.popleft()
            report = await judge.judge(tasks[one.line[0]], one.patch)
            reports[one.line] = report
            if report.resolved is None and one.before is not None:
                kept += 1
            else:
                await writer.add(one.line, report)
            if on_result is not None:
                on_result(Judged(*one.line[:3], report))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(max(1, num_workers), len(work))):
                group.create_task(serve())
    except* SpiderError as errors:
        # The others were stopped for the first one's sake.
        raise next(_leaves(errors)) from None
    finally:
        writer.flush()
    return _sum_up(dataclasses.replace(found, kept=kept), list(reports.values()))


def _plan(path: Path, tasks: Mapping[str, Task], force: bool) -> tuple[list[_Work], Summary]:
    index = read_index(path)
    if not index.latest and not path.exists():
        raise FileNotFoundError(path)
    work, unknown, skipped, unjudged = [], [], 0, 0
    for entry in index.latest.values():
        record = index.load(entry)
        if record.instance_id not in tasks:
            unknown.append(record.instance_id)
        elif not judgeable(record):
            unjudged += 1
        elif not force and _settled(record):
            skipped += 1
        else:
            work.append(_Work(_line(record), record.git_patch or "", known_verdict(record)))
    summary = Summary(
        skipped=skipped,
        unjudged=unjudged,
        unknown=tuple(sorted(set(unknown))),
        torn=_torn(path),
    )
    return work, summary


def _line(record: Record) -> _Line:
    return *record.key, record.attempt, patch_digest(record.git_patch or "")


def _settled(record: Record) -> bool:
    """Whether there is a report on this very patch, by today's policy or taken over from a public
    harness, that will not change."""
    report = record.report or {}
    return (
        report.get("patch_sha256") == patch_digest(record.git_patch or "")
        and report.get("policy") in (policy.NAME, IMPORTED)
        and (report.get("resolved") is not None or report.get("invalid_task") is True)
    )


def _torn(path: Path) -> int:
    """The length of a last line that is no record and has no end."""
    with path.open("rb") as file:
        last = collections.deque(file, maxlen=1)
    line = last[0] if last else b"\n"
    if line.endswith(b"\n"):
        return 0
    try:
        json.loads(line)
    except ValueError:
        return len(line)
    return 0


def with_report(record: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """The record with a report in the places where readers look for it."""
    judged = report.to_json()
    result = {**(record.get("test_result") or {}), "report": judged}
    return {**record, "test_result": result, "resolved": report.resolved, "report": judged}


class _Writer:
    """Puts reports into the file, a few at a time: each time the whole of it is written."""

    def __init__(self, path: Path, interval: float) -> None:
        self._path = path
        self._interval = interval
        self._due = time.monotonic() + interval
        self._waiting: dict[_Line, Report] = {}
        self._lock = asyncio.Lock()

    async def add(self, line: _Line, report: Report) -> None:
        self._waiting[line] = report
        if time.monotonic() >= self._due and not self._lock.locked():
            async with self._lock:
                await asyncio.to_thread(self.flush)

    def flush(self) -> None:
        """Blocking."""
        reports = dict(self._waiting)
        if not reports:
            return
        began = time.monotonic()

        def change(record: Record) -> Mapping[str, Any]:
            report = reports.get(_line(record))
            return record.data if report is None else with_report(record.data, report)

        rewrite(self._path, change)
        for line, report in reports.items():
            if self._waiting.get(line) is report:
                del self._waiting[line]
        ended = time.monotonic()
        self._due = ended + max(self._interval, 20 * (ended - began))


def _sum_up(found: Summary, reports: list[Report]) -> Summary:
    return dataclasses.replace(
        found,
        judged=len(reports),
        resolved=sum(report.resolved is True for report in reports),
        unresolved=sum(report.resolved is False for report in reports),
        undecided=sum(report.resolved is None for report in reports),
        invalid=sum(report.invalid_task for report in reports),
        flaky=sum(bool(report.flaky) for report in reports),
    )


def _leaves(group: BaseExceptionGroup[SpiderError]) -> Iterator[SpiderError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
