"""The same fixed rollouts at a Tinker-compatible server and under the local trainer.

``python -m benchmarks.bench_tinker_parity`` starts SkyRL's server on the CPU (``make tinker-cpu``),
exports a fresh adapter of its into the local trainer, and takes three optimiser steps on both with
each loss. It prints one JSON document with the largest relative differences.
"""

from __future__ import annotations

__all__ = ["figures", "main", "measure"]

import asyncio
import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import Figure
from spider_worker.trainers.tinker.passes import LOSSES
from tests.support.tinker_parity import compare
from tests.support.tinker_server import ServerProcess, make_served_model

BAR = 1e-3


def measure() -> dict[str, Any]:
    """Differences by loss. Raises SystemExit where the server's environment is not there."""
    if said := ServerProcess.missing():
        raise SystemExit(said)
    with tempfile.TemporaryDirectory(prefix="spider-bench-") as scratch:
        folder = Path(scratch)
        model = make_served_model(folder / "model")
        (folder / "server").mkdir()
        with ServerProcess(model, folder / "server") as server:
            found = asyncio.run(compare(server.model, server.url, LOSSES))
    return {name: dataclasses.asdict(parity) for name, parity in found.items()}


def figures(measured: Mapping[str, Any]) -> list[Figure]:
    """The worst over all losses."""
    name = "Tinker-compatible server against the local trainer, three steps: relative difference of"
    return [
        Figure(
            f"{name} {what}",
            max(parity[key] for parity in measured.values()),
            BAR,
            at_least=False,
            detail=dict(measured),
        )
        for what, key in (("losses", "loss"), ("per-token logprobs", "logprobs"))
    ]


def main() -> None:
    print(json.dumps(measure(), indent=1))


if __name__ == "__main__":
    main()
