"""Settings of an API process (SPIDER_*)."""

from __future__ import annotations

__all__ = ["ApiSettings"]

import dataclasses

from spider_sdk.settings import setting

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class ApiSettings:
    """What one API process does. What jobs may do is set with the worker's settings, which
    the API reads too, so that a job is refused when it is submitted and not when it starts."""

    host: str = setting("127.0.0.1", "Address that the API listens on.", env="SPIDER_API_HOST")
    port: int = setting(9000, "Port of the API (0: any free one).", env="SPIDER_API_PORT")
    workers: int = setting(1, "API processes behind the port.", env="SPIDER_API_WORKERS")
    connections: int = setting(
        4000, "Clients that one API process serves at once.", env="SPIDER_API_CONNECTIONS"
    )
    reaper: bool = setting(True, "Run the fleet's reaper in this API process.")
    max_body: int = setting(32 * MIB, "Largest body of a request, uploads apart, in bytes.")
    max_input: int = setting(64 * 1024 * MIB, "Largest uploaded input, in bytes.")
    max_active_jobs: int = setting(
        1000, "Queued and running jobs that one owner may have (0: no limit)."
    )
    sse_heartbeat: float = setting(15.0, "Seconds of silence after which a stream says so.")
    sse_backlog: int = setting(1000, "Events that may wait for a slow client before it is dropped.")
    sse_send_timeout: float = setting(
        60.0, "Seconds that a client may take no data before its stream is cut."
    )
    retry_after: int = setting(5, "Seconds that a 503 asks clients to wait.")
