"""Waiting until a program answers for real, and saying why where it does not."""

from __future__ import annotations

__all__ = ["api_ready", "until", "workers_ready"]

import time
from collections.abc import Callable, Iterable, Sequence

import httpx2
from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from spider_api.embedded.process import Program
from spider_sdk.errors import ServerUnreachable

INTERVAL = 0.1  #: seconds between two tries


def until(
    check: Callable[[], bool], programs: Iterable[Program], what: str, *, seconds: float
) -> None:
    """Try ``check`` until it holds. Raises ServerUnreachable with the end of the log where one of
    ``programs`` ends meanwhile, or where ``seconds`` pass."""
    watched = list(programs)
    deadline = time.monotonic() + seconds
    while not check():
        for program in watched:
            if not program.running:
                raise ServerUnreachable(died(program))
        if time.monotonic() > deadline:
            raise ServerUnreachable(
                f"{what} did not answer within {seconds:.0f} s\n{tails(watched)}"
            )
        time.sleep(INTERVAL)


def died(program: Program) -> str:
    return f"{program.name} ended (exit code {program.exit_code()})\n{tails([program])}"


def tails(programs: Sequence[Program]) -> str:
    """The last lines of each log under its path."""
    return "\n".join(f"--- {program.log}\n{program.log_tail()}" for program in programs)


def api_ready(base_url: str) -> bool:
    """``/readyz`` answers 200: the API runs and its Redis answers."""
    try:
        # A proxy of the environment's is for the world outside, not for 127.0.0.1.
        answer = httpx2.get(f"{base_url}/readyz", timeout=5.0, trust_env=False)
    except httpx2.HTTPError:
        return False
    return answer.status_code == httpx2.codes.OK


def workers_ready(app: Celery, names: Sequence[str]) -> bool:
    """Every one of ``names`` answers Celery's ping."""
    try:
        answers = app.control.ping(destination=list(names), timeout=1.0)
    except (OperationalError, RedisError, OSError):
        return False
    return {name for answer in answers for name in answer} >= set(names)
