"""States from which a job must still find its end."""

from __future__ import annotations

from spider_sdk.jobs import JobStatus
from spider_worker.fleet import Fleet, NoUnit
from tests.support.units import ALL, claim, plan, submit


def test_a_unit_that_stopped_in_a_job_that_goes_on_is_taken_up_again(fleet: Fleet) -> None:
    """A runner that believes in a cancel which is no more (the job was retried since)."""
    job = submit(fleet)
    plan(fleet, job, units=1)
    held = claim(fleet, job)
    fleet.units.commit(held, complete=False, counters={"rows_done": 2})
    again = claim(fleet, job, "other")
    assert again.unit == held.unit
    fleet.units.commit(again, complete=True, counters={"rows_done": 5})
    assert claim(fleet, job).kind == "finalise"
    assert fleet.jobs.get(job).metrics["rows_done"] == 5


def test_a_runner_of_before_the_retry_gets_no_unit_of_it(fleet: Fleet) -> None:
    """It still has the secrets that the job failed for."""
    job = submit(fleet)
    plan(fleet, job, units=3)
    old = claim(fleet, job, "old")
    fleet.units.fail(claim(fleet, job, "bad"), "wrong key", fatal=True)
    fleet.jobs.retry(job)
    found = fleet.units.claim(job, "old", ALL, life=old.life)
    assert isinstance(found, NoUnit)
    assert fleet.units.beat(job, [old]).lost == [old]
    fresh = claim(fleet, job, "new")
    assert fresh.life != old.life
    assert fleet.redis.hgetall(f"spider:job:{job}:holders") == {b"new": b"1"}


def test_a_job_whose_runner_died_between_two_units_waits_again(fleet: Fleet) -> None:
    job = submit(fleet)
    plan(fleet, job)
    fleet.units.commit(claim(fleet, job), complete=True, counters={})
    assert fleet.jobs.get(job).status is JobStatus.RUNNING
    fleet.redis.hset(f"spider:job:{job}", "updated", 0)
    fleet.redis.zadd("spider:active", {job: 0})
    fleet.reaper.sweep()
    assert fleet.jobs.get(job).status is JobStatus.QUEUED
    assert claim(fleet, job).unit == "u1"


def test_hints_do_not_pile_up_while_nobody_reads_them(fleet: Fleet) -> None:
    """A queue without a worker over a weekend must not fill Redis."""
    jobs = [submit(fleet) for _ in range(3)]
    for _ in range(200):
        fleet.redis.zadd("spider:active", dict.fromkeys(jobs, 0))
        fleet.reaper.sweep()
    assert fleet.redis.llen("spider:offline-gen") < 150


def test_a_publication_that_fails_at_the_end_still_lets_the_job_end(fleet: Fleet) -> None:
    job = submit(fleet)
    plan(fleet, job, units=2, publishes=True, publish_every=1)
    fleet.units.commit(claim(fleet, job), complete=True, counters={}, publishable=5)
    publishing = claim(fleet, job, "p", ("publish",))
    fleet.units.commit(claim(fleet, job), complete=True, counters={}, publishable=5)
    fleet.units.fail(publishing, "the Hub is away")
    assert claim(fleet, job).kind == "finalise", "what is left is published by the end"
