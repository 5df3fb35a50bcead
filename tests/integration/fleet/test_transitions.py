"""The record's transitions, each on a real Redis."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from spider_sdk.errors import IdempotencyConflict, IllegalTransition, JobNotFound, LeaseLost
from spider_sdk.jobs import JobStatus, Queue
from spider_worker.fleet import Claim, Fleet, NoUnit
from tests.support.units import ALL, DOCUMENT, claim, plan, submit


def finish(fleet: Fleet, held: Claim, **counters: float) -> None:
    fleet.units.commit(held, complete=True, counters=counters)


def test_a_job_runs_from_submit_to_completed(fleet: Fleet) -> None:
    job = submit(fleet)
    assert fleet.jobs.get(job).status is JobStatus.QUEUED
    plan(fleet, job)
    assert fleet.jobs.get(job).status is JobStatus.RUNNING
    finish(fleet, claim(fleet, job), rows_done=3, rows_ok=3)
    finish(fleet, claim(fleet, job), rows_done=4, rows_ok=4)
    end = claim(fleet, job)
    assert end.kind == "finalise"
    fleet.units.commit(end, complete=True, counters={}, outcome={"message": "done"})
    record = fleet.jobs.get(job)
    assert record.status is JobStatus.COMPLETED
    assert record.metrics["rows_done"] == 7
    offsets = [event.offset for event in fleet.events.read(job).events]
    assert offsets == list(range(record.next_offset))


def test_a_plan_without_units_leads_to_the_end(fleet: Fleet) -> None:
    job = submit(fleet)
    plan(fleet, job, units=0, rows_total=0)
    assert claim(fleet, job).kind == "finalise"


def test_finalising_waits_for_every_unit(fleet: Fleet) -> None:
    job = submit(fleet)
    plan(fleet, job)
    finish(fleet, claim(fleet, job))
    held = claim(fleet, job)
    assert isinstance(fleet.units.claim(job, "other", ALL), NoUnit)
    finish(fleet, held)
    assert claim(fleet, job, "other").kind == "finalise"


def test_no_two_holders_of_one_unit(fleet: Fleet) -> None:
    job = submit(fleet)
    plan(fleet, job, units=20)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: fleet.units.claim(job, f"h{i}", ALL), range(30)))
    held = [c.unit for c in found if isinstance(c, Claim)]
    assert sorted(held) == sorted({f"u{i}" for i in range(20)})


def test_parallelism_caps_runners_not_their_units(fleet: Fleet) -> None:
    job = submit(fleet, parallelism=1)
    plan(fleet, job, units=3)
    claim(fleet, job, "a")
    assert isinstance(fleet.units.claim(job, "b", ALL), NoUnit)
    claim(fleet, job, "a")


def test_a_stale_writer_is_refused_everywhere(fleet: Fleet) -> None:
    job = submit(fleet)
    plan(fleet, job)
    stale = claim(fleet, job, "old")
    fleet.units.release(stale, "test")
    fresh = claim(fleet, job, "new")
    assert fresh.unit == stale.unit
    assert fresh.fence > stale.fence
    for write in (
        lambda: fleet.units.commit(stale, complete=True, counters={}),
        lambda: fleet.units.progress(stale, {}, {}),
        lambda: fleet.units.fail(stale, "x"),
        lambda: fleet.units.register_journal(stale, "{}"),
        lambda: fleet.units.save_state(stale, "s", {}),
        lambda: fleet.units.add(stale, [("u9", 9, {})]),
        lambda: fleet.units.event(stale, "info", "c", "m", {}),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert fleet.units.beat(job, [stale]).lost == [stale]
    finish(fleet, fresh)


def test_a_commit_sent_twice_counts_once(fleet: Fleet) -> None:
    job = submit(fleet)
    plan(fleet, job)
    held = claim(fleet, job)
    finish(fleet, held, rows_done=5)
    finish(fleet, held, rows_done=5)
    assert fleet.jobs.get(job).metrics["rows_done"] == 5
    finish(fleet, claim(fleet, job), rows_done=1)
    assert claim(fleet, job).kind == "finalise"


def test_expired_leases_go_back_and_attempts_run_out(fleet: Fleet) -> None:
    job = submit(fleet)
    plan(fleet, job, units=1)
    for attempt in range(1, fleet.settings.max_attempts + 1):
        held = _claim_when_due(fleet, job)
        assert held.attempts == attempt
        _expire(fleet, held)
        fleet.reaper.sweep()
    record = fleet.jobs.get(job)
    assert record.status is JobStatus.FAILED
    assert record.reason == "attempts_exhausted"
    assert "silent" in (record.error or "")


def test_progress_resets_the_attempts(fleet: Fleet) -> None:
    job = submit(fleet)
    plan(fleet, job, units=1)
    for done in range(1, 3 * fleet.settings.max_attempts):
        held = _claim_when_due(fleet, job)
        fleet.units.progress(held, {"rows_done": done}, {})
        fleet.units.fail(held, "pre-empted")
    assert fleet.jobs.get(job).status is JobStatus.QUEUED


def test_a_unit_that_broke_runs_alone(fleet: Fleet) -> None:
    job = submit(fleet)
    plan(fleet, job, units=3)
    fleet.units.fail(claim(fleet, job, "a"), "its runner died")
    assert claim(fleet, job, "a").unit == "u1"
    _claim_nothing_until_due(fleet, job, "b")
    assert claim(fleet, job, "a").unit == "u2", "the suspect is left to whoever holds nothing"
    assert isinstance(fleet.units.claim(job, "a", ALL), NoUnit)
    assert claim(fleet, job, "b").unit == "u0"


def test_a_fatal_error_fails_the_job_and_revokes_its_neighbours(fleet: Fleet) -> None:
    job = submit(fleet)
    plan(fleet, job)
    first, second = claim(fleet, job, "a"), claim(fleet, job, "b")
    fleet.units.fail(first, "no such model", fatal=True, reason="engine_unavailable")
    record = fleet.jobs.get(job)
    assert (record.status, record.error) == (JobStatus.FAILED, "no such model")
    assert fleet.units.beat(job, [second]).lost == [second]


def test_cancel_of_a_waiting_job_is_immediate_and_of_a_running_one_waits(fleet: Fleet) -> None:
    waiting = submit(fleet)
    assert fleet.jobs.cancel(waiting).status is JobStatus.CANCELLED
    running = submit(fleet)
    plan(fleet, running)
    held = claim(fleet, running)
    assert fleet.jobs.cancel(running).status is JobStatus.RUNNING
    assert fleet.units.beat(running, [held]).cancelled
    assert isinstance(fleet.units.claim(running, "other", ALL), NoUnit)
    fleet.units.commit(held, complete=False, counters={"rows_done": 2})
    assert fleet.jobs.get(running).status is JobStatus.CANCELLED


def test_a_retry_opens_what_is_missing_or_errored_and_nothing_else(fleet: Fleet) -> None:
    job = submit(fleet)
    plan(fleet, job, units=3)
    finish(fleet, claim(fleet, job), rows_done=5, rows_error=1)
    finish(fleet, claim(fleet, job), rows_done=5)
    claim(fleet, job)
    fleet.jobs.cancel(job)
    with pytest.raises(IllegalTransition):
        fleet.jobs.retry(job)
    _settle_cancel(fleet, job)
    fleet.jobs.retry(job)
    assert {claim(fleet, job).unit, claim(fleet, job).unit} == {"u0", "u2"}
    assert isinstance(fleet.units.claim(job, "h", ("work",)), NoUnit)


def test_nothing_to_retry_is_said(fleet: Fleet) -> None:
    job = submit(fleet)
    plan(fleet, job, units=0)
    fleet.units.commit(claim(fleet, job), complete=True, counters={}, outcome={"message": "ok"})
    with pytest.raises(IllegalTransition, match="no missing"):
        fleet.jobs.retry(job)


def test_publication_opens_by_rows_and_never_twice(fleet: Fleet) -> None:
    job = submit(fleet)
    plan(fleet, job, units=3, publishes=True, publish_every=10)
    for _ in range(2):
        fleet.units.commit(
            claim(fleet, job, kinds=("work",)), complete=True, counters={}, publishable=6
        )
    publishing = claim(fleet, job, "p", ("publish",))
    assert isinstance(fleet.units.claim(job, "q", ("publish",)), NoUnit)
    finish(fleet, claim(fleet, job, kinds=("work",)))
    assert isinstance(fleet.units.claim(job, "h", ("finalise",)), NoUnit), "a publication runs"
    finish(fleet, publishing)
    assert claim(fleet, job).kind == "finalise"


def test_one_idempotency_key_one_job(fleet: Fleet) -> None:
    def send(_: int) -> str:
        return fleet.jobs.submit(
            "me", DOCUMENT, {"T": "x"}, queue=Queue.OFFLINE_GEN, idempotency_key="k"
        ).job_id

    with ThreadPoolExecutor(16) as pool:
        ids = set(pool.map(send, range(100)))
    assert len(ids) == 1
    assert len(fleet.jobs.list("me")[0]) == 1
    with pytest.raises(IdempotencyConflict):
        fleet.jobs.submit("me", {"a": 1}, {}, queue=Queue.OFFLINE_GEN, idempotency_key="k")
    fleet.jobs.submit("you", {"a": 1}, {}, queue=Queue.OFFLINE_GEN, idempotency_key="k")


def test_another_owners_job_is_not_there(fleet: Fleet) -> None:
    job = submit(fleet)
    for look in (fleet.jobs.get, fleet.jobs.cancel, fleet.jobs.retry):
        with pytest.raises(JobNotFound):
            look(job, "you")


def test_the_list_pages_without_loss(fleet: Fleet) -> None:
    jobs = {submit(fleet) for _ in range(25)}
    seen: list[str] = []
    cursor = None
    while True:
        page, cursor = fleet.jobs.list("me", limit=4, cursor=cursor)
        seen += [record.job_id for record in page]
        if cursor is None:
            break
    assert sorted(seen) == sorted(jobs)


def test_lost_hints_are_published_again(fleet: Fleet) -> None:
    job = submit(fleet)
    for key in fleet.redis.keys("spider:_kombu*"):
        fleet.redis.delete(key)
    fleet.redis.delete("spider:offline-gen")
    fleet.redis.zadd("spider:active", {job: 0})
    fleet.reaper.sweep()
    assert fleet.redis.llen("spider:offline-gen") == 1


def test_events_older_than_kept_are_reported_as_truncated(fleet: Fleet) -> None:
    job = submit(fleet)
    for i in range(5):
        fleet.events.append(job, "info", "note", str(i))
    fleet.redis.xtrim(f"spider:job:{job}:events", maxlen=2, approximate=False)
    page = fleet.events.read(job, since=0)
    assert page.truncated
    assert [e.offset for e in page.events] == [page.start_offset, page.start_offset + 1]
    assert not fleet.events.read(job, since=page.start_offset).truncated


def test_the_reaper_stops_when_told(fleet: Fleet) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=fleet.reaper.run, args=(stop,))
    thread.start()
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def test_secrets_are_ciphertext_and_gone_at_the_end(fleet: Fleet) -> None:
    record = fleet.jobs.submit("me", DOCUMENT, {"HF_TOKEN": "canary-1234"}, queue=Queue.OFFLINE_GEN)
    assert fleet.jobs.secrets(record.job_id) == {"HF_TOKEN": "canary-1234"}
    everything = b"".join(fleet.redis.dump(key) or b"" for key in fleet.redis.keys("*"))
    assert b"canary" not in everything
    fleet.jobs.cancel(record.job_id)
    assert fleet.jobs.secrets(record.job_id) == {}


def _claim_when_due(fleet: Fleet, job: str) -> Claim:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = fleet.units.claim(job, "h", ALL)
        if isinstance(found, Claim):
            return found
        assert found.retry_in is not None
        time.sleep(found.retry_in)
    raise AssertionError("the unit never came back")


def _claim_nothing_until_due(fleet: Fleet, job: str, holder: str) -> None:
    """Let the pause before the next attempt pass."""
    found = fleet.units.claim(job, holder, ("publish",))
    assert isinstance(found, NoUnit)
    time.sleep(found.retry_in or 0)


def _expire(fleet: Fleet, held: Claim) -> None:
    fleet.redis.zadd("spider:leases", {f"{held.job_id} {held.unit}": 0})


def _settle_cancel(fleet: Fleet, job: str) -> None:
    fleet.redis.zadd("spider:leases", dict.fromkeys(fleet.redis.zrange("spider:leases", 0, -1), 0))
    fleet.reaper.sweep()
    assert fleet.jobs.get(job).status is JobStatus.CANCELLED


def test_a_cost_is_null_until_it_is_known_whole(fleet: Fleet) -> None:
    job = submit(fleet)
    plan(fleet, job)
    assert fleet.jobs.get(job).metrics["cost_usd"] is None
    finish(fleet, claim(fleet, job), cost_usd=0.5)
    assert fleet.jobs.get(job).metrics["cost_usd"] == 0.5
    finish(fleet, claim(fleet, job), completions_unpriced=1)
    assert fleet.jobs.get(job).metrics["cost_usd"] is None
