"""How long a word takes: submit to the supervisor's claim, publish to a hundred followers."""

from __future__ import annotations

__all__ = ["latency"]

import asyncio
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

import aiohttp

from benchmarks.report import Figure
from spider_api.embedded import EmbeddedFleet, FleetOptions
from spider_sdk import Client
from spider_sdk.config import AppConfig
from spider_worker.fleet import Fleet
from spider_worker.settings import FleetSettings
from tests.support.openai_server import Script, running_server

JOBS = 40
CLIENTS = 100
EVENTS = 200


def latency() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="spider-bench-") as folder:
        options = FleetOptions(state=Path(folder) / "state", port=0)
        with EmbeddedFleet(options, lambda *_: None) as fleet:
            claims = _claims(fleet, Path(folder))
            arrivals = _arrivals(fleet)
    claims_ms = [1000 * seconds for seconds in claims]
    arrivals_ms = sorted(1000 * seconds for seconds in arrivals)
    p99 = arrivals_ms[int(len(arrivals_ms) * 0.99)]
    return [
        Figure("submit to the claim event at a following client: p50, ms",
               statistics.median(claims_ms), 60, at_least=False, detail={"ms": claims_ms}),
        Figure(f"publish to client, {CLIENTS} SSE clients: p99, ms", p99, 50, at_least=False,
               detail={"p50": statistics.median(arrivals_ms), "max": arrivals_ms[-1]}),
    ]  # fmt: skip


def _claims(fleet: EmbeddedFleet, folder: Path) -> list[float]:
    """Seconds from the call of ``submit_job`` to the event, one job after another."""
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "hello"}\n')
    seconds = []
    with running_server(Script()) as endpoint:
        job = {
            "model": {"provider": "openai", "name": "m", "base_url": endpoint.base_url},
            "source": {"dataset": str(rows), "field": "prompt"},
        }
        config = AppConfig.from_dict({"job": job})
        with Client(config, base_url=fleet.base_url, api_key=fleet.api_key) as client:
            for _ in range(JOBS):
                began = time.perf_counter()
                job_id = client.submit_job()["job_id"]
                for event in client.events(job_id):
                    if event.code == "unit.claimed":
                        seconds.append(time.perf_counter() - began)
                        break
                client.poll_job(job_id, interval=0.05, timeout=60)
    return seconds


def _arrivals(fleet: EmbeddedFleet) -> list[float]:
    """Seconds from just before an event is written until each client has it."""
    store = Fleet.connect(FleetSettings(redis_url=_redis_url(fleet)))
    job = max(store.redis.keys("spider:job:????????????????"))
    job_id = job.decode().rsplit(":", 1)[1]
    # Its end would end the streams: an open job is what followers follow.
    store.redis.hset(job, "status", "running")
    arrivals: list[float] = []
    try:
        asyncio.run(_follow(fleet, store, job_id, arrivals))
    finally:
        store.redis.hset(job, "status", "completed")
        store.close()
    return arrivals


async def _follow(fleet: EmbeddedFleet, store: Fleet, job_id: str, arrivals: list[float]) -> None:
    url = f"{fleet.base_url}/v1/jobs/{job_id}/events"
    since = store.jobs.get(job_id).next_offset
    headers = {"Authorization": f"Bearer {fleet.api_key}", "Last-Event-ID": f"{since - 1}-1"}
    ready = asyncio.Semaphore(0)

    async def client(session: aiohttp.ClientSession) -> None:
        seen = 0
        async with session.get(url, headers=headers) as answer:
            answer.raise_for_status()
            ready.release()
            async for line in answer.content:
                if line.startswith(b"data:"):
                    document = json.loads(line[5:])
                    if document.get("code") == "bench":
                        arrivals.append(time.time() - document["data"]["sent"])
                        seen += 1
                        if seen == EVENTS:
                            return

    def publish() -> None:
        for _ in range(EVENTS):
            store.events.append(job_id, "info", "bench", "tick", {"sent": time.time()})
            time.sleep(0.05)

    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as s:
        tasks = [asyncio.create_task(client(s)) for _ in range(CLIENTS)]
        for _ in range(CLIENTS):
            await ready.acquire()
        thread = threading.Thread(target=publish)
        thread.start()
        await asyncio.gather(*tasks)
        thread.join()


def _redis_url(fleet: EmbeddedFleet) -> str:
    for line in fleet.state.env_file.read_text().splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        if name == "SPIDER_REDIS_URL":
            return value.strip("'\"")
    raise RuntimeError("the state folder names no Redis")
