"""One Redis client a process, its errors told apart, and the fleet's Lua scripts."""

from __future__ import annotations

__all__ = ["Client", "Scripts", "connect", "fleet_errors"]

import contextlib
import functools
from collections.abc import Iterator
from importlib import resources
from typing import Any

import redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisError, ResponseError
from redis.retry import Retry

from spider_sdk.errors import FleetUnavailable, IllegalTransition
from spider_worker.fleet.names import PREFIX

#: A ``redis.Redis``. Its annotations describe sync and async clients at once, so that every
#: answer would need a cast; the answers are checked where they are used.
Client = Any

#: A command's own limit. It bounds how long a half-dead server can hold a caller; no
#: command of ours blocks on purpose.
SOCKET_TIMEOUT = 5.0
#: Retries over about two seconds: a dropped connection or a restart of Redis is ridden out
#: here, and scripts are written so that a replay changes nothing.
RETRIES = 6
#: First words of errors that pass: a server that is full, cannot save, loads, or is busy.
UNAVAILABLE = ("OOM", "MISCONF", "LOADING", "READONLY", "BUSY", "NOREPLICAS", "MASTERDOWN")
#: Connections of one process; commands are short, so that many callers share a few.
MAX_CONNECTIONS = 64
#: Seconds that a caller waits for one of them.
POOL_TIMEOUT = 20.0


def connect(url: str) -> Client:
    """A client for ``url``; connects on first use.

    Its pool is bounded and waited for: redis-py's own refuses the hundred-and-first caller, and
    an API process has more clients than that at once.
    """
    pool = redis.BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=POOL_TIMEOUT,
        socket_timeout=SOCKET_TIMEOUT,
        socket_connect_timeout=SOCKET_TIMEOUT,
        socket_keepalive=True,
        health_check_interval=10,
        retry=Retry(ExponentialBackoff(cap=1.0, base=0.05), RETRIES),
        retry_on_error=[redis.exceptions.ConnectionError, redis.exceptions.TimeoutError],
        decode_responses=False,
    )
    return redis.Redis.from_pool(pool)


@contextlib.contextmanager
def fleet_errors() -> Iterator[None]:
    """Map redis-py's errors to FleetUnavailable and refused transitions to their own."""
    try:
        yield
    except (OutOfMemoryError, ReadOnlyError) as error:
        # Classes of redis-py's own, whose texts no longer begin with the server's word.
        raise FleetUnavailable(f"Redis takes no writes: {error}") from error
    except ResponseError as error:
        text = str(error)
        if "SPIDER illegal transition" in text:
            raise IllegalTransition(text.split("SPIDER ", 1)[1]) from error
        if text.startswith(UNAVAILABLE) or "OOM" in text:
            raise FleetUnavailable(f"Redis takes no writes: {text}") from error
        raise
    except RedisError as error:
        raise FleetUnavailable(f"Redis does not answer: {error}") from error


@functools.cache
def _source(name: str) -> str:
    folder = resources.files("spider_worker.fleet") / "lua"
    return (folder / "prelude.lua").read_text() + (folder / f"{name}.lua").read_text()


class Scripts:
    """Every transition of the fleet is one of these scripts, so it happens whole or not at all."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._scripts: dict[str, Any] = {}

    def run(self, name: str, *args: str | bytes | float) -> Any:
        """Run ``lua/{name}.lua`` after the prelude. Raises FleetUnavailable, IllegalTransition."""
        script = self._scripts.get(name)
        if script is None:
            script = self._scripts[name] = self._client.register_script(_source(name))
        with fleet_errors():
            return script(keys=[], args=[PREFIX, *args])
