"""A free engine: what the pipeline itself costs, in time and in memory.

    python benchmarks/bench_free_engine.py [--rows 1000000] [--json FILE]

Runs the off-policy pipeline in one process over short rows with an engine that answers at once,
at ``--rows`` rows and at 10,000, each in a fresh interpreter. Prints one table row a measure and
writes JSON. Rows per second count from the plan to the finalised job; memory is the peak RssAnon
of the process, sampled while it works. ``--source datasets`` (the default) reads a JSON Lines file
through the data set library, conversion included; ``--source memory`` makes rows as they are read
and so measures the pipeline alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

_BASE_ROWS = 10_000
_SOURCES = ("memory", "datasets")
_TARGET_SPEED, _TARGET_MEMORY = 20_000, 1.2


def rss_anon_mib() -> float:
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    raise RuntimeError("this kernel does not tell RssAnon")


class PeakMemory(threading.Thread):
    """Samples RssAnon every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0.0
        self._stop_event = threading.Event()

    def run(self) -> None:
        while not self._stop_event.wait(0.02):
            self.peak = max(self.peak, rss_anon_mib())

    def stop(self) -> float:
        self._stop_event.set()
        self.join()
        return max(self.peak, rss_anon_mib())


def row(index: int) -> dict[str, Any]:
    return {"question": f"What is {index} plus {index % 97}?", "number": index}


def run_once(rows: int, source_kind: str, folder: Path) -> dict[str, float]:
    import uvloop

    from spider_sdk.config.model import JobConfig, ModelConfig, SourceConfig
    from spider_worker.pipelines.offline_gen.pipeline import OfflineGenPipeline
    from spider_worker.testing import (
        FakeEngine,
        InMemorySource,
        LocalContext,
        LocalStore,
        fake_parts,
        run_job_locally,
    )

    if source_kind == "datasets":
        source = datasets_source(rows, folder)
    else:
        source = InMemorySource(row, rows)
    job = JobConfig(
        model=ModelConfig(provider="vllm", name="free"),
        source=SourceConfig(dataset="numbers", field="question"),
    )
    engine = FakeEngine(lambda *_: "It is so.", capacity=512, keep=False)
    pipeline = OfflineGenPipeline(job, fake_parts(source, engine))

    async def main() -> float:
        ctx = LocalContext(LocalStore(folder / "job"), job)
        started = time.perf_counter()
        done = await run_job_locally(pipeline, ctx)
        seconds = time.perf_counter() - started
        assert done.counters()["rows_ok"] == rows, done.counters()
        return seconds

    memory = PeakMemory()
    memory.start()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        seconds = runner.run(main())
    return {"rows": rows, "seconds": seconds, "rss_anon_mib": memory.stop()}


def datasets_source(rows: int, folder: Path) -> Any:
    from spider_sdk.config.model import InputFile, SourceConfig
    from spider_worker.sources.build import build_source

    path = folder / "numbers.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row(index)) + "\n" for index in range(rows))
    config = SourceConfig(
        dataset="numbers.jsonl", field="question", inputs=(InputFile(path.name, "0" * 64),)
    )
    return build_source(config, {path.name: path}, None, None)


def in_fresh_interpreter(rows: int, source_kind: str) -> dict[str, float]:
    # The environment that a supervisor gives its runners.
    env = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
    with tempfile.TemporaryDirectory(prefix="bench-free-engine-") as folder:
        command = [sys.executable, __file__, "--once", str(rows), source_kind, folder]
        answer = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    measured: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--source", choices=_SOURCES, default="datasets")
    parser.add_argument("--json", type=Path, default=None, help="write the figures there")
    parser.add_argument("--once", nargs=3, metavar=("ROWS", "SOURCE", "FOLDER"))
    options = parser.parse_args()
    if options.once:
        rows, source_kind, folder = options.once
        print(json.dumps(run_once(int(rows), source_kind, Path(folder))))
        return
    base = in_fresh_interpreter(_BASE_ROWS, options.source)
    full = in_fresh_interpreter(options.rows, options.source)
    speed = full["rows"] / full["seconds"]
    memory = full["rss_anon_mib"] / base["rss_anon_mib"]
    report = {
        "benchmark": "free_engine",
        "source": options.source,
        "base": base,
        "full": full,
        "rows_per_second": {"value": speed, "target": _TARGET_SPEED, "at_least": True},
        "rss_anon_ratio": {"value": memory, "target": _TARGET_MEMORY, "at_least": False},
    }
    rows = f"{options.rows:,} rows"
    print(f"| free engine, {rows}: rows/s | {speed:,.0f} | at least {_TARGET_SPEED:,} |")
    print(f"| free engine, {rows}: peak RssAnon over {_BASE_ROWS:,} rows | {memory:.2f} |"
          f" at most {_TARGET_MEMORY} |")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
