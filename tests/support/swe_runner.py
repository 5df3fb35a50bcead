"""A runner whose SWE jobs have a pipeline of pretence: real units, no agents.

``python -m tests.support.swe_runner --control … --report …`` in place of
``spider_worker.runner``. The file that ``SWE_LOG`` names gets a line for each instance that
begins. An instance costs a dollar, ends once the file that ``SWE_GATE`` names is there, and writes
one record.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path

from spider_sdk.config.model import SweConfig
from spider_worker.pipelines.base import (
    JobContext,
    JobResult,
    Pipeline,
    Plan,
    UnitContext,
    UnitOutcome,
    UnitSpec,
)
from spider_worker.settings import WorkerSettings


class PretendedSwe:
    grace = 5.0

    def __init__(self, job: SweConfig) -> None:
        self._job = job

    async def plan(self, ctx: JobContext[SweConfig]) -> Plan:
        for file in ctx.job.inputs:
            ctx.input_path(file.sha256)
        units = [UnitSpec(f"instance-{n}", n, {"n": n}) for n in range(ctx.job.max_instances or 1)]
        return Plan(units, rows_total=len(units))

    async def run(self, ctx: UnitContext[SweConfig]) -> UnitOutcome:
        ctx.draining()
        _log(f"begin {ctx.unit.id} {ctx.grant}")
        await asyncio.to_thread(_wait, Path(os.environ["SWE_GATE"]))
        path = ctx.scratch / "record.jsonl"
        path.write_text(json.dumps({"instance_id": ctx.unit.id}, separators=(",", ":")) + "\n")
        return UnitOutcome({"rows_done": 1, "rows_ok": 1, "cost_usd": 1.0}, file=path)

    async def publish(self, ctx: JobContext[SweConfig]) -> None:
        raise AssertionError("nothing is published")

    async def finalise(self, ctx: JobContext[SweConfig]) -> JobResult:
        return JobResult(message=f"{len(ctx.shards())} instances")


def _wait(gate: Path) -> None:
    while not gate.exists():
        time.sleep(0.02)


def _log(line: str) -> None:
    log = os.open(os.environ["SWE_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, f"{line}\n".encode())
    os.close(log)


def lines(log: Path) -> list[list[str]]:
    """The words of each line so far."""
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def build_pipeline(job: SweConfig, settings: WorkerSettings) -> Pipeline[SweConfig]:
    return PretendedSwe(job)


if __name__ == "__main__":
    from spider_worker.runner import runner
    from spider_worker.runner.__main__ import main

    runner.build_pipeline = build_pipeline  # type: ignore[assignment]
    sys.exit(main())
