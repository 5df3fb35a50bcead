"""Jobs and claims by hand, for tests of the record."""

from __future__ import annotations

from spider_sdk.jobs import Queue
from spider_worker.fleet import Claim, Fleet

ALL = ("plan", "work", "publish", "finalise")
DOCUMENT = {"model": {"name": "m"}}


def submit(fleet: Fleet, **document: object) -> str:
    return fleet.jobs.submit("me", {**DOCUMENT, **document}, {}, queue=Queue.OFFLINE_GEN).job_id


def claim(fleet: Fleet, job: str, holder: str = "h", kinds: tuple[str, ...] = ALL) -> Claim:
    found = fleet.units.claim(job, holder, kinds)
    assert isinstance(found, Claim), found
    return found


def plan(fleet: Fleet, job: str, units: int = 2, **outcome: object) -> None:
    specs = [[f"u{i}", i, "{}"] for i in range(units)]
    fleet.units.commit(
        claim(fleet, job, kinds=("plan",)),
        complete=True,
        counters={},
        outcome={"units": specs, **outcome},
    )
