"""How much of the fleet one owner holds."""

from __future__ import annotations

__all__ = ["active_jobs", "active_total", "replays"]

from spider_worker.fleet.connection import fleet_errors
from spider_worker.fleet.fleet import Fleet
from spider_worker.fleet.names import job_key, key


def active_jobs(fleet: Fleet, owner: str, enough: int) -> int:
    """The number of the owner's jobs that have not ended.

    Where the whole fleet has fewer than ``enough``, its number is given instead, which costs
    one look: the caller only asks whether a limit is reached.
    """
    active = key("active")
    with fleet_errors():
        total = int(fleet.redis.zcard(active))
        if total < enough:
            return total
        pipe = fleet.redis.pipeline(transaction=False)
        for job_id in fleet.redis.zrange(active, 0, -1):
            pipe.hget(job_key(job_id.decode()), "owner")
        owners = pipe.execute()
    return sum(name == owner.encode() for name in owners)


def active_total(fleet: Fleet) -> int:
    """The number of jobs of the whole fleet that have not ended."""
    with fleet_errors():
        return int(fleet.redis.zcard(key("active")))


def replays(fleet: Fleet, owner: str, idempotency_key: str) -> bool:
    """Has this key of the owner's made a job within its 24 hours?"""
    with fleet_errors():
        return bool(fleet.redis.exists(key("idem", owner, idempotency_key)))
