"""How many units a job without a fleet has at work."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from spider_sdk.config.model import JobConfig, ModelConfig, SourceConfig
from spider_worker.pipelines.base import JobContext, JobResult, Plan, UnitContext, UnitOutcome
from spider_worker.pipelines.base import UnitSpec as Unit
from spider_worker.testing import LocalContext, LocalStore, run_job_locally

UNITS = 7


class Crowd:
    """Units that drain at once, and end when no further one has come for a while."""

    grace = 1.0

    def __init__(self) -> None:
        self.at_work = 0
        self.most = 0

    async def plan(self, ctx: JobContext) -> Plan:
        return Plan(units=[Unit(f"u{number}", number, {}) for number in range(UNITS)])

    async def run(self, ctx: UnitContext) -> UnitOutcome:
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        ctx.draining()
        for _ in range(100):  # turns of the loop, in which the others come if they may
            await asyncio.sleep(0)
        self.at_work -= 1
        return UnitOutcome(counters={"rows_done": 1}, file=None, complete=True)

    async def publish(self, ctx: JobContext) -> None:
        raise AssertionError("nothing is to be published")

    async def finalise(self, ctx: JobContext) -> JobResult:
        return JobResult(remote_artifact=None, message="")


@pytest.mark.parametrize(("options", "most"), [({}, 2), ({"overlap": 1}, 1), ({"overlap": 4}, 4)])
def test_at_most_so_many_units_are_at_work(
    tmp_path: Path, options: dict[str, int], most: int
) -> None:
    crowd = Crowd()
    job = JobConfig(model=ModelConfig(provider="vllm", name="fake"), source=SourceConfig("memory"))
    store = LocalStore(tmp_path)
    asyncio.run(run_job_locally(crowd, LocalContext(store, job), **options))
    assert crowd.most == most
    assert not any(unit["open"] for unit in store.units.values())
