"""What a SWE job may have at work and spend: counted over the whole fleet, as units are claimed."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from spider_sdk.errors import ConfigError, LeaseLost
from spider_sdk.events import Event
from spider_sdk.jobs import JobStatus, Queue
from spider_worker.fleet import Claim, Fleet, NoUnit
from spider_worker.fleet.rebuild import rebuild
from tests.support.units import ALL, claim, plan

WORK = ("work",)


def submit(fleet: Fleet, **swe: object) -> str:
    document = {"swe": {"llm_model": "m", **swe}}
    return fleet.jobs.submit("me", document, {}, queue=Queue.SWE_AGENT).job_id


def planned(fleet: Fleet, units: int = 4, **swe: object) -> str:
    job = submit(fleet, **swe)
    plan(fleet, job, units=units, rows_total=units)
    return job


def done(fleet: Fleet, held: Claim, cost: float, **more: float) -> None:
    counters = {"rows_done": 1, "cost_usd": cost, **more}
    fleet.units.commit(held, complete=True, counters=counters)


def refused(fleet: Fleet, job: str, holder: str = "h", kinds: tuple[str, ...] = ALL) -> bool:
    return isinstance(fleet.units.claim(job, holder, kinds), NoUnit)


def events(fleet: Fleet, job: str, code: str) -> list[Event]:
    return [event for event in fleet.events.read(job).events if event.code == code]


def finalised(fleet: Fleet, job: str) -> None:
    end = claim(fleet, job)
    assert end.kind == "finalise"
    fleet.units.commit(end, complete=True, counters={}, outcome={"message": "done"})


def hinted(fleet: Fleet, job: str) -> bool:
    """Does a sweep, when the job is due for one, publish a hint?"""
    fleet.redis.delete("spider:swe-agent")
    fleet.redis.zadd("spider:active", {job: 0})
    fleet.reaper.sweep()
    return fleet.redis.llen("spider:swe-agent") == 1


# Places.


def test_num_workers_units_are_live_at_a_time_on_all_workers_together(fleet: Fleet) -> None:
    job = planned(fleet, units=5, num_workers=2)
    first, _ = claim(fleet, job, "a"), claim(fleet, job, "b")
    assert refused(fleet, job, "a")
    assert refused(fleet, job, "c")
    assert first.grant is None
    done(fleet, first, 1.0)
    claim(fleet, job, "c")
    assert refused(fleet, job, "a")


def test_many_claims_at_once_take_no_place_twice(fleet: Fleet) -> None:
    job = planned(fleet, units=40, num_workers=7, max_budget_total=5, max_budget_per_instance=1)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: fleet.units.claim(job, f"h{i}", ALL), range(40)))
    assert sum(isinstance(one, Claim) for one in found) == 5


def test_a_place_is_free_again_whichever_way_its_unit_ends(fleet: Fleet) -> None:
    job = planned(fleet, units=9, num_workers=1)
    done(fleet, claim(fleet, job, "a"), 0)
    fleet.units.fail(claim(fleet, job, "b"), "broke")
    fleet.units.release(claim(fleet, job, "c"), "shut down")
    held = claim(fleet, job, "d")
    fleet.redis.zadd("spider:leases", {f"{job} {held.unit}": 0})
    fleet.reaper.sweep()
    claim(fleet, job, "e")


def test_publishing_takes_no_place(fleet: Fleet) -> None:
    job = submit(fleet, num_workers=1)
    plan(fleet, job, units=3, publishes=True, publish_every=1)
    fleet.units.commit(claim(fleet, job), complete=True, counters={}, publishable=1)
    assert claim(fleet, job, "a", ("publish",)).kind == "publish"
    assert claim(fleet, job, "b").kind == "work"
    assert refused(fleet, job, "c")


def test_no_hint_goes_out_for_units_that_may_not_be_claimed(fleet: Fleet) -> None:
    job = planned(fleet, units=3, num_workers=1)
    assert hinted(fleet, job)
    held = claim(fleet, job)
    assert not hinted(fleet, job)
    fleet.redis.zadd("spider:active", {job: 9e15})  # nobody would look for a long time
    done(fleet, held, 0)
    due = fleet.redis.zscore("spider:active", job)
    assert due is not None
    assert due <= time.time() * 1000 + 1000
    assert hinted(fleet, job)


def test_a_unit_that_waits_for_its_next_attempt_gets_no_hint_without_a_place(fleet: Fleet) -> None:
    job = planned(fleet, units=2, num_workers=1)
    fleet.units.fail(claim(fleet, job), "broke")
    claim(fleet, job)
    assert fleet.redis.zcard(f"spider:job:{job}:delayed") == 1
    fleet.redis.zadd(f"spider:job:{job}:delayed", {"u0": 0})
    assert not hinted(fleet, job)


# Money.


def test_a_claim_sets_its_instances_budget_aside(fleet: Fleet) -> None:
    job = planned(fleet, num_workers=4, max_budget_total=10, max_budget_per_instance=4)
    first, second = claim(fleet, job), claim(fleet, job)
    assert (first.grant, second.grant) == (4, 4)
    assert refused(fleet, job), "2 dollars are neither spent nor reserved"
    done(fleet, first, 1.5)  # 1.5 spent, 4 reserved: 4.5 are left
    assert claim(fleet, job).grant == 4
    assert refused(fleet, job)


def test_what_is_reported_is_not_reserved_as_well(fleet: Fleet) -> None:
    job = planned(fleet, num_workers=4, max_budget_total=9, max_budget_per_instance=4)
    held = claim(fleet, job)
    fleet.units.progress(held, {"cost_usd": 3.0}, {})
    second = claim(fleet, job)
    assert second.grant == 4
    done(fleet, second, 0)
    fleet.units.progress(held, {"cost_usd": 6.0}, {})
    assert refused(fleet, job), "who spends more than its grant takes it from the rest"


def test_the_last_dollar_is_given_out_though_floats_do_not_add_up(fleet: Fleet) -> None:
    job = planned(fleet, units=10, num_workers=1, max_budget_total=1, max_budget_per_instance=0.1)
    for _ in range(10):
        done(fleet, claim(fleet, job, kinds=WORK), 0.1)
    finalised(fleet, job)
    assert not events(fleet, job, "budget.spent")


def test_without_a_budget_per_instance_a_claim_gets_an_even_part_of_what_is_left(
    fleet: Fleet,
) -> None:
    job = planned(fleet, units=6, num_workers=2, max_budget_total=100)
    first, second = claim(fleet, job), claim(fleet, job)
    assert (first.grant, second.grant) == (50, 50)
    done(fleet, first, 2)
    third = claim(fleet, job)
    assert third.grant == pytest.approx(48), "the other half is reserved"
    done(fleet, second, 20)
    done(fleet, third, 8)
    assert claim(fleet, job).grant == pytest.approx(35)
    assert claim(fleet, job).grant == pytest.approx(35)


def test_nobody_begins_with_the_crumbs_of_a_budget(fleet: Fleet) -> None:
    job = planned(fleet, units=3, num_workers=2, max_budget_total=100)
    done(fleet, claim(fleet, job), 99.6)
    (said,) = events(fleet, job, "budget.spent")
    assert said.data["units"] == 2
    finalised(fleet, job)


def test_when_the_money_is_spent_the_rest_is_skipped_and_the_job_ends(fleet: Fleet) -> None:
    job = planned(fleet, num_workers=2, max_budget_total=5, max_budget_per_instance=2)
    first, second = claim(fleet, job), claim(fleet, job)
    done(fleet, first, 2)
    assert not events(fleet, job, "budget.spent"), "the other may leave something"
    assert refused(fleet, job)
    done(fleet, second, 2)
    (said,) = events(fleet, job, "budget.spent")
    assert said.level == "warning"
    assert said.data == {"spent_usd": 4, "budget_usd": 5, "needed_usd": 2, "units": 2}
    assert "$4.00 of $5.00" in said.message
    assert claim(fleet, job).kind == "finalise"
    metrics = fleet.jobs.get(job).metrics
    assert (metrics["units_skipped"], metrics["cost_usd"], metrics["rows_total"]) == (2, 4, 4)


def test_a_unit_that_waits_for_its_next_attempt_is_skipped_too(fleet: Fleet) -> None:
    job = planned(fleet, units=1, num_workers=1, max_budget_total=3, max_budget_per_instance=2)
    held = claim(fleet, job)
    fleet.units.progress(held, {"cost_usd": 1.5}, {})
    fleet.units.fail(held, "broke")
    assert events(fleet, job, "budget.spent")[0].data["units"] == 1
    finalised(fleet, job)
    assert fleet.jobs.get(job).status is JobStatus.COMPLETED


def test_a_retry_under_a_larger_budget_opens_what_was_left_out(fleet: Fleet) -> None:
    job = planned(fleet, num_workers=1, max_budget_total=2, max_budget_per_instance=2)
    done(fleet, claim(fleet, job), 1.0)
    finalised(fleet, job)
    fleet.jobs.retry(job)
    assert len(events(fleet, job, "budget.spent")) == 2, "nothing is there to go on with"
    finalised(fleet, job)
    with pytest.raises(ConfigError, match="max_budget_per_instance"):
        fleet.jobs.retry(job, budget=1.0)
    record = fleet.jobs.retry(job, budget=5.0)
    assert record.document["swe"]["max_budget_total"] == 5.0
    assert "units_skipped" not in record.metrics
    for cost in (1.0, 1.0):
        done(fleet, claim(fleet, job, kinds=WORK), cost)
    done(fleet, claim(fleet, job), 2.0)
    finalised(fleet, job)
    assert fleet.jobs.get(job).metrics["cost_usd"] == 5


def test_a_job_without_a_budget_has_none_to_raise(fleet: Fleet) -> None:
    job = fleet.jobs.submit("me", {"model": {}}, {}, queue=Queue.OFFLINE_GEN).job_id
    fleet.jobs.cancel(job)
    with pytest.raises(ConfigError, match="only a SWE job"):
        fleet.jobs.retry(job, budget=1.0)


# What is spent stays spent.


def test_a_later_attempt_that_tells_of_less_hides_nothing(fleet: Fleet) -> None:
    job = planned(fleet, units=1, num_workers=1, max_budget_total=9, max_budget_per_instance=3)
    first = claim(fleet, job)
    fleet.units.progress(first, {"cost_usd": 2.0, "rows_done": 0}, {})
    fleet.units.release(first, "its worker shut down")
    with pytest.raises(LeaseLost):
        fleet.units.progress(first, {"cost_usd": 2.5}, {})
    second = claim(fleet, job)
    for told, spent in ((0.5, 2.0), (1.9, 2.0), (3.0, 3.0)):
        fleet.units.progress(second, {"cost_usd": told}, {})
        assert fleet.jobs.get(job).metrics["cost_usd"] == spent
    fleet.units.progress(second, {"rows_done": 0}, {})
    assert fleet.jobs.get(job).metrics["cost_usd"] == 3.0, "nor one that tells of nothing"
    done(fleet, second, 2.5, rows_error=1)
    finalised(fleet, job)
    fleet.jobs.retry(job)
    done(fleet, claim(fleet, job), 1.0)
    assert fleet.jobs.get(job).metrics["cost_usd"] == 3.0


def test_what_earlier_attempts_spent_is_no_part_of_a_new_grant(fleet: Fleet) -> None:
    job = planned(fleet, units=2, num_workers=2, max_budget_total=6, max_budget_per_instance=2)
    first = claim(fleet, job)
    fleet.units.progress(first, {"cost_usd": 2.0}, {})
    fleet.units.release(first, "shut down")
    again = claim(fleet, job)
    assert (again.unit, again.grant) == ("u0", 2)
    fleet.units.progress(again, {"cost_usd": 2.5}, {})  # 2.5 spent, 1.5 reserved: 2 are left
    assert claim(fleet, job).grant == 2


def test_a_job_of_rows_counts_as_ever(fleet: Fleet) -> None:
    job = fleet.jobs.submit("me", {"model": {}}, {}, queue=Queue.OFFLINE_GEN).job_id
    plan(fleet, job, units=1)
    held = claim(fleet, job)
    assert held.grant is None
    fleet.units.progress(held, {"cost_usd": 2.0}, {})
    fleet.units.progress(held, {"cost_usd": 0.5}, {})
    assert fleet.jobs.get(job).metrics["cost_usd"] == 0.5


def test_caps_outlive_the_loss_of_redis(fleet: Fleet) -> None:
    job = planned(fleet, num_workers=1, max_budget_total=3, max_budget_per_instance=1)
    fleet.jobs.cancel(job)
    fleet.jobs.retry(job, budget=2.0)
    fleet.redis.flushall()
    assert rebuild(fleet) == [job]
    fleet.jobs.retry(job)
    plan(fleet, job, units=4)
    first = claim(fleet, job)
    assert first.grant == 1
    assert refused(fleet, job)
    done(fleet, first, 1.0)
    done(fleet, claim(fleet, job), 1.0)
    assert events(fleet, job, "budget.spent")[0].data["units"] == 2


@pytest.mark.parametrize("seed", range(4))
def test_no_history_of_a_job_spends_more_than_its_budget(fleet: Fleet, seed: int) -> None:
    """Claims, reports, deaths and commits as they may fall, where no unit spends more than its
    grant."""
    dice = random.Random(seed)
    units, places, total, each = 12, 3, 7.0, 1.0
    caps = {"num_workers": places, "max_budget_total": total}
    if seed % 2:
        caps["max_budget_per_instance"] = each
    job = planned(fleet, units=units, **caps)
    live: list[tuple[Claim, float]] = []
    bill = dict.fromkeys((f"u{i}" for i in range(units)), 0.0)
    for _ in range(400):
        if fleet.jobs.get(job).status.is_terminal:
            break
        if live and dice.random() < 0.7:
            held, used = live.pop(dice.randrange(len(live)))
            assert held.grant is not None
            more = dice.random() * (held.grant - used)
            bill[held.unit] += more
            fleet.units.progress(held, {"cost_usd": bill[held.unit]}, {})
            word = dice.random()
            if word < 0.4:
                done(fleet, held, bill[held.unit])
            elif word < 0.6:
                fleet.units.release(held, "shut down")
            else:
                live.append((held, used + more))
        found = fleet.units.claim(job, dice.choice("abc"), ALL)
        if isinstance(found, Claim):
            if found.kind == "finalise":
                fleet.units.commit(found, complete=True, counters={}, outcome={"message": "done"})
            else:
                live.append((found, 0.0))
        assert len(live) <= places
        assert sum(bill.values()) <= total + 1e-6
    record = fleet.jobs.get(job)
    assert record.status is JobStatus.COMPLETED
    assert record.metrics["cost_usd"] == pytest.approx(sum(bill.values()))
    skipped = record.metrics.get("units_skipped") or 0
    assert (record.metrics["rows_done"] or 0) + skipped == units
