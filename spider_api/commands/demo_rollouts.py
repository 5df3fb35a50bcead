"""The first part of ``spider demo``: rollouts of a model that adds, checked by a processor."""

from __future__ import annotations

__all__ = ["run_rollouts"]

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from spider_api.commands.demo_job import DemoFleet, run_job
from spider_api.commands.reporting import Reporter
from spider_sdk.bundle import load_function
from spider_sdk.cli.state import State
from spider_sdk.client import Client

SHOWN = 5  #: rollouts that are printed


def run_rollouts(state: State, say: Reporter, fleet: DemoFleet, rows: int, folder: Path) -> None:
    """Ask ``rows`` questions, write ``rollouts.jsonl`` into ``folder`` and show some of it.

    Raises JobFailed and JobCancelled.
    """
    shipped, results = fleet.shipped, folder / "rollouts.jsonl"
    processors = shipped / "processors.py"
    changes = {
        "model": {"name": str(shipped / "adder")},
        "source": {"dataset": str(shipped / "prompts.jsonl"), "max_examples": rows},
    }
    with Client(
        shipped / "demo.yaml",
        base_url=fleet.base_url,
        api_key=fleet.api_key,
        pre_processor=load_function(f"{processors}:ask"),
        post_processor=load_function(f"{processors}:check_sum"),
    ) as client:
        job_id = run_job(client, state, say, shipped / "demo.yaml", changes)
        client.download_result(job_id, results)
    with results.open(encoding="utf-8") as lines:
        _show(state, say, [json.loads(line) for line in lines], results)


def _show(state: State, say: Reporter, records: list[dict[str, Any]], results: Path) -> None:
    good = [record for record in records if record.get("error") is None]
    right = sum(bool(record["correct"]) for record in good)
    where = str(results.absolute())
    say.document("result", records=len(records), correct=right, path=where)
    if state.json:
        return
    _print_table(good[:SHOWN], f"{min(SHOWN, len(good))} of {len(records)} rollouts")
    state.say(f"{right} of {len(records)} sums are right.")
    state.say(f"Results: {where}\n")


def _print_table(records: list[dict[str, Any]], title: str) -> None:
    """With lines around it on a terminal; elsewhere columns alone, for files and pipes."""
    console = Console()
    lines = box.HEAVY_HEAD if console.is_terminal else None
    table = Table(title=title, title_style="", title_justify="left", box=lines)
    for column in ("id", "prompt", "completion", "correct"):
        table.add_column(column)
    for record in records:
        mark = "yes" if record["correct"] else f"no, {record['expected']}"
        table.add_row(record["id"], record["question"], record["completion"], mark)
    console.print()
    console.print(table)
