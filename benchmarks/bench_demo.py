"""The second job of ``spider demo`` as a person runs it, on a fleet that is started for it."""

from __future__ import annotations

__all__ = ["distil"]

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import Figure

ROOT = Path(__file__).parent.parent


def distil() -> list[Figure]:
    """From the command to its end, the fleet's start and stop in it; what the student comes to."""
    command = [sys.executable, "-m", "spider_sdk.cli.main", "demo", "--only", "distil", "--json"]
    with tempfile.TemporaryDirectory(prefix="spider-bench-") as state:
        began = time.monotonic()
        done = subprocess.run(
            [*command, "--state", state], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        seconds = time.monotonic() - began
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    (found,) = (one for one in documents if one.get("event") == "distilled")
    return [
        Figure("demo, distillation with a fleet's start and stop: seconds", seconds, 120.0,
               at_least=False),
        Figure("  accuracy on held-out sums before", found["before"], 0.2, at_least=False),
        Figure("  accuracy after", found["after"], 0.9),
    ]  # fmt: skip
