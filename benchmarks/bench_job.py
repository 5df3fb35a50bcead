"""Whole jobs on a real fleet against a scripted endpoint: speed, faults, a kill at half.

The endpoint's own clock gives rows/s from the first request to the last answer, so that what a
job does before and after (starting a process, reading data, finalising) is reported beside and
not mixed in. The bare client runs before and after the job on the same server.
"""

from __future__ import annotations

__all__ = ["clean", "faults", "kill_at_half"]

import contextlib
import json
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.bench_openai import bare_rows_per_second
from benchmarks.report import Figure
from spider_sdk.jobs import JobStatus
from tests.support.fleet_harness import Harness, eventually, start
from tests.support.jobs import openai_job, upload_rows
from tests.support.openai_server import spawn_server

IN_FLIGHT = 512
LATENCY = ("--latency-ms", "200")
FAULTS = ("--error-rate", "0.02", "--throttle-rate", "0.05")


@contextlib.contextmanager
def fleet() -> Iterator[Harness]:
    with tempfile.TemporaryDirectory(prefix="spider-bench-") as folder:
        yield from start(Path(folder), SPIDER_LEASE="60", SPIDER_HINT_AFTER="30")


def control(base_url: str, path: str, *, post: bool = False) -> Any:
    url = base_url.removesuffix("/v1") + path
    request = urllib.request.Request(url, method="POST" if post else "GET")
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def run_job(harness: Harness, base_url: str, rows: int) -> dict[str, Any]:
    """One job of ``rows`` rows: seconds between first request and last answer, wall time,
    rows lost or doubled."""
    control(base_url, "/reset", post=True)
    source = upload_rows(harness.fleet, rows)
    began = time.perf_counter()
    job = harness.submit({**openai_job(base_url, source, in_flight=IN_FLIGHT), "shard_size": None})
    record = harness.wait(job, seconds=600)
    wall = time.perf_counter() - began
    assert record.status is JobStatus.COMPLETED, harness.story(job)
    stats = control(base_url, "/stats")
    seconds = stats["last_response"] - stats["first_request"]
    return {"seconds": seconds, "wall": wall, **count(harness, job, rows), "stats": stats}


def count(harness: Harness, job: str, rows: int) -> dict[str, int]:
    good = [r["index"] for r in harness.records(job) if r["error"] is None]
    return {"lost": rows - len(set(good)), "duplicates": len(good) - len(set(good))}


def clean(rows: int = 10_000) -> list[Figure]:
    with fleet() as harness, spawn_server(*LATENCY) as url:
        harness.worker()
        # The first job pays for imports; a fleet that serves jobs has paid.
        run_job(harness, url, 100)
        bare = [uvloop.run(bare_rows_per_second(url, rows, IN_FLIGHT))]
        job = run_job(harness, url, rows)
        bare.append(uvloop.run(bare_rows_per_second(url, rows, IN_FLIGHT)))
    speed, base = rows / job["seconds"], sum(bare) / len(bare)
    detail = {"rows": rows, "rows_per_second": speed, "bare": bare, **job}
    return [
        Figure(f"openai, {rows:,} rows, 200 ms: rows/s over bare aiohttp", speed / base, 0.75,
               detail=detail),
        Figure("  wall time of the whole job, seconds", job["wall"]),
    ]  # fmt: skip


def faults(rows: int = 20_000) -> list[Figure]:
    figures = []
    with fleet() as harness:
        harness.worker()
        with spawn_server(*LATENCY) as url:
            run_job(harness, url, 100)
            base = run_job(harness, url, rows)
        for name, extra, bar in (
            ("2% 500 and 5% 429", (), 1.3),
            ("the same with Retry-After: 1", ("--retry-after", "1"), None),
        ):
            with spawn_server(*LATENCY, *FAULTS, *extra) as url:
                job = run_job(harness, url, rows)
            ratio = job["seconds"] / base["seconds"]
            detail = {"clean": base["seconds"], **job}
            figures.append(Figure(f"openai, {rows:,} rows, {name}: time over clean", ratio, bar,
                                  at_least=False, detail=detail))  # fmt: skip
            figures.append(Figure("  rows lost", job["lost"], 0, at_least=False))
    return figures


def kill_at_half(rows: int = 10_000) -> list[Figure]:
    """kill -9 of worker and runner once half of the rows are done."""
    with fleet() as harness, spawn_server(*LATENCY) as url:
        # A short lease, since the lease is how long a dead host goes unnoticed.
        harness.env["SPIDER_LEASE"] = "5"
        harness.fleet.settings.__dict__["lease"] = 5.0
        worker = harness.worker()
        job = harness.submit(openai_job(url, upload_rows(harness.fleet, rows), in_flight=IN_FLIGHT))

        def half() -> bool:
            return harness.fleet.jobs.get(job).metrics.get("rows_done", 0) >= rows / 2

        eventually(half, "half of the rows", 300)
        worker.kill_all()
        killed = time.perf_counter()
        before = control(url, "/stats")["requests"]
        harness.worker()
        eventually(lambda: control(url, "/stats")["requests"] > before, "the job goes on", 120)
        resumed = time.perf_counter() - killed
        harness.wait(job, seconds=300)
        found = count(harness, job, rows)
        repeated = control(url, "/stats")["requests"] - rows
    return [
        Figure(f"kill -9 at half of {rows:,} rows: lost", found["lost"], 0, at_least=False),
        Figure("  duplicate", found["duplicates"], 0, at_least=False),
        Figure("  requests repeated (in flight: 512)", repeated, IN_FLIGHT, at_least=False),
        Figure("  seconds to the next request (lease 5 s)", resumed),
    ]


if __name__ == "__main__":
    from benchmarks.report import table

    print(table([*clean(), *kill_at_half(), *faults()]))
