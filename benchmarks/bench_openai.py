"""The openai engine against a bare aiohttp client, on one scripted server in one run.

Engine level: no pipeline around it. ``python -m benchmarks.bench_openai [--rows N] [--faults]``
prints one JSON document; ``bare_rows_per_second`` and ``measure_engine`` are for larger
benchmarks to reuse.
"""

from __future__ import annotations

__all__ = ["EngineRun", "bare_rows_per_second", "main", "measure_engine"]

import argparse
import asyncio
import dataclasses
import json
import time
import urllib.request
from typing import Any

import aiohttp
import uvloop

from spider_worker.engines.openai import OpenAIEngine
from tests.support.openai_server import spawn_server


@dataclasses.dataclass(frozen=True)
class EngineRun:
    """``rows_per_second`` over the whole run; ``lost`` rows that ended without an answer."""

    rows_per_second: float
    seconds: float
    lost: int
    throttled: int
    retries: int
    server: dict[str, Any]


async def bare_rows_per_second(base_url: str, rows: int, in_flight: int) -> float:
    """What aiohttp alone does: post, read, decode, nothing else."""
    numbers = iter(range(rows))
    url = f"{base_url}/chat/completions"

    async def worker(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            messages = [{"role": "user", "content": f"row {number}"}]
            async with session.post(url, json={"model": "tiny", "messages": messages}) as response:
                answer = await response.json()
                assert answer["choices"][0]["message"]["content"]

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(worker(session) for _ in range(in_flight)))
        return rows / (time.perf_counter() - began)


async def measure_engine(base_url: str, rows: int, in_flight: int) -> EngineRun:
    """As many callers as the engine's capacity, each with one row after another."""
    numbers = iter(range(rows))
    answered: set[str] = set()
    engine = OpenAIEngine("tiny", base_url=base_url, max_in_flight=in_flight)
    await engine.start()

    async def worker() -> None:
        for number in numbers:
            messages = [{"role": "user", "content": f"row {number}"}]
            answered.add((await engine.complete(messages, (), {})).text)

    began = time.perf_counter()
    try:
        await asyncio.gather(*(worker() for _ in range(engine.info.capacity)))
        seconds = time.perf_counter() - began
        stats = engine.stats()
    finally:
        await engine.close()
    server = await asyncio.to_thread(_server_stats, base_url)
    return EngineRun(
        rows_per_second=rows / seconds,
        seconds=seconds,
        lost=rows - len(answered),
        throttled=stats.throttled,
        retries=stats.retries,
        server=server,
    )


def _server_stats(base_url: str) -> dict[str, Any]:
    with urllib.request.urlopen(base_url.removesuffix("/v1") + "/stats") as answer:
        return dict(json.load(answer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--in-flight", type=int, default=512)
    parser.add_argument("--latency-ms", default="200")
    parser.add_argument("--faults", action="store_true", help="also 2%% 500 and 5%% 429")
    options = parser.parse_args()
    size = (options.rows, options.in_flight)
    latency = ("--latency-ms", options.latency_ms)
    result: dict[str, Any] = {}
    with spawn_server(*latency) as url:
        result["bare_rows_per_second"] = bare = uvloop.run(bare_rows_per_second(url, *size))
    with spawn_server(*latency) as url:
        clean = uvloop.run(measure_engine(url, *size))
    result["engine"] = dataclasses.asdict(clean)
    result["engine_over_bare"] = clean.rows_per_second / bare
    faults = ("--error-rate", "0.02", "--throttle-rate", "0.05")
    for name, extra in (("faults", ()), ("faults_retry_after_1", ("--retry-after", "1"))):
        if options.faults:
            with spawn_server(*latency, *faults, *extra) as url:
                run = uvloop.run(measure_engine(url, *size))
            result[name] = dataclasses.asdict(run)
            result[f"{name}_time_over_clean"] = run.seconds / clean.seconds
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
