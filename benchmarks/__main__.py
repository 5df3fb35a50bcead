"""``make bench``: every benchmark, one table, one JSON file.

``python -m benchmarks [NAME …]`` runs only those named (see ``BENCHMARKS``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import bench_demo, bench_fleet, bench_job, bench_swe, bench_tinker_parity
from benchmarks.report import Figure, table

OUT = Path(__file__).parent / "out"


def free_engine() -> list[Figure]:
    """In interpreters of its own: memory is what is measured."""
    report = _module("benchmarks.bench_free_engine", "--json", str(OUT / "free_engine.json"))
    del report
    measured = json.loads((OUT / "free_engine.json").read_text())
    speed, memory = measured["rows_per_second"], measured["rss_anon_ratio"]
    return [
        Figure("free engine, 1,000,000 rows: rows/s", speed["value"], speed["target"]),
        Figure("  peak RssAnon over that at 10,000 rows", memory["value"], memory["target"],
               at_least=False, detail=measured),
    ]  # fmt: skip


def vllm() -> list[Figure]:
    measured = json.loads(_module("benchmarks.bench_vllm"))
    name = "vllm, 1,024 prompts of 64 tokens in four shards: tokens/s over one LLM.chat"
    return [Figure(name, measured["median_ratio"], 0.97, detail=measured)]


def alignment() -> list[Figure]:
    measured = json.loads(_module("benchmarks.bench_alignment"))
    name = "alignment of 10,000 tokens: tokens/s over the teacher's encode, the least of four pairs"
    return [
        Figure(name, measured["ratio"], 1.0, detail=measured),
        Figure("  time at 20,000 over time at 10,000, the most", measured["growth"], 2.5,
               at_least=False),
    ]  # fmt: skip


def training() -> list[Figure]:
    """Speed and overhead of the local trainer's steps beside TRL's GOLD."""
    measured = json.loads(_module("benchmarks.bench_onpolicy", "speed"))["speed"]
    name = "training: tokens trained a second over TRL's GOLD, median of three rounds"
    return [
        Figure(name, measured["median_ratio"], 2.0, detail=measured),
        Figure("  the same with sampled log-probabilities alone", measured["median_ratio_sampled"]),
        Figure("  a step's time over its calls'", measured["median_overhead"], 1.05,
               at_least=False),
    ]  # fmt: skip


def quality() -> list[Figure]:
    measured = json.loads(_module("benchmarks.bench_onpolicy", "quality"))["quality"]
    name = "training: held-out accuracy less GOLD's after as many tokens, five seeds, in SE"
    return [Figure(name, measured["gaps_in_standard_errors"]["ours"], -1.0, detail=measured)]


def tinker() -> list[Figure]:
    return bench_tinker_parity.figures(json.loads(_module("benchmarks.bench_tinker_parity")))


BENCHMARKS: dict[str, Callable[[], Sequence[Figure]]] = {
    "openai": bench_job.clean,
    "faults": bench_job.faults,
    "vllm": vllm,
    "free-engine": free_engine,
    "alignment": alignment,
    "training": training,
    "quality": quality,
    "tinker": tinker,
    "demo": bench_demo.distil,
    "latency": bench_fleet.latency,
    "kill": bench_job.kill_at_half,
    "swe": bench_swe.swe,
}


def _module(name: str, *arguments: str) -> str:
    """Run a benchmark in a fresh interpreter; returns the JSON document that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", name, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    start = done.stdout.find("\n{") + 1
    return done.stdout[start:]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure Spider against bare clients.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, default=OUT / "bench.json")
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    OUT.mkdir(exist_ok=True)
    figures: list[Figure] = []
    for name in options.names or BENCHMARKS:
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        figures += BENCHMARKS[name]()
    print(table(figures))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "figures": [figure.to_json() for figure in figures],
    }
    options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    if any(figure.met is False for figure in figures):
        print("A bar was missed: benchmarks/README.md says which, by how much and why.")


if __name__ == "__main__":
    main()
