"""A job in a process of its own, for test_crash.py to kill: ``crashing_job.py FOLDER KIND``.

Each request is written to ``FOLDER/asked`` the moment the engine gets it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

ROWS, CAPACITY = 2_000, 16


def main(folder: Path, kind: str) -> None:
    from spider_worker.testing import FakeEngine, InMemorySource
    from tests.unit.offline_gen.jobs import Setup

    asked = os.open(folder / "asked", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def script(messages: Any, params: Any) -> str:
        return f"answer to {messages[-1]['content']}"

    def latency(messages: Any) -> float:
        text = str(messages[-1]["content"])
        os.write(asked, f"{text}\n".encode())
        return (hash(text) % 7) / 1000  # out of order

    setup = Setup(
        folder / "job",
        source=InMemorySource(lambda i: {"question": f"q{i}"}, ROWS, stream=kind == "stream"),
        engine=FakeEngine(script, capacity=CAPACITY, latency=latency, keep=False),
        shard_size=300,
    )
    if kind == "processors":
        setup.pre = lambda row: None if row["question"].endswith("7") else row["question"]
        setup.post = lambda row: None if row["question"].endswith("3") else row
    asyncio.run(setup.run())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
