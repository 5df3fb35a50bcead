"""``spider demo``: a real job on an embedded fleet, from nothing to results."""

from __future__ import annotations

__all__ = ["demo"]

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from spider_api.commands.reporting import Reporter
from spider_sdk.bundle import load_function
from spider_sdk.cli.follow import follow
from spider_sdk.cli.options import pass_state
from spider_sdk.cli.state import Detached, State, json_option
from spider_sdk.client import Client
from spider_sdk.errors import JobCancelled, JobFailed, UsageError
from spider_sdk.jobs import JobStatus

if TYPE_CHECKING:
    from spider_api.embedded import EmbeddedFleet

SHOWN = 5  #: rollouts that are printed


@click.command()
@click.option(
    "--rows",
    default=200,
    show_default=True,
    type=click.IntRange(1),
    help="Number of questions to ask (there are 400).",
)
@click.option(
    "--state",
    "folder",
    default=Path(".spider/demo"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the fleet and the results.",
)
@click.option("--keep", is_flag=True, help="Keep the fleet's own folder (logs, Redis, artifacts).")
@json_option
@pass_state
def demo(state: State, rows: int, folder: Path, keep: bool) -> None:
    """Run a real job with a small model on a fleet of its own, and stop everything again.

    The model ships with Spider and adds two-digit numbers; processors build the prompts and
    check the sums. Nothing is downloaded.
    """
    # Here, not above: Celery and redis take half a second that `spider demo --help` can do without.
    from spider_api.embedded import (
        EmbeddedFleet,
        FleetOptions,
        StateFolder,
        choose_sandbox,
        demo_folder,
        port_or_any,
    )

    shipped = demo_folder()
    if shipped is None:
        raise UsageError("config/demo is not here: run `spider demo` from a checkout of Spider")
    say = Reporter(state)
    sandbox, warning = choose_sandbox(os.environ)
    if warning:
        say.warning(warning)
    fleet_folder = folder / "fleet"
    with StateFolder(fleet_folder) as earlier:  # refuses a folder that another fleet uses
        earlier.clear()
    options = FleetOptions(state=fleet_folder, port=port_or_any(9000), sandbox=sandbox)
    try:
        with EmbeddedFleet(options, say.status) as fleet:
            records = _run(state, say, fleet, shipped, rows, folder / "rollouts.jsonl")
            _show(state, say, records, folder / "rollouts.jsonl")
    except (KeyboardInterrupt, Detached):
        raise Detached("stopped; everything that the demo started is gone") from None
    finally:
        if keep:
            state.say(f"The fleet's folder is {fleet_folder.absolute()}.")
        else:
            shutil.rmtree(fleet_folder, ignore_errors=True)


def _run(
    state: State, say: Reporter, fleet: EmbeddedFleet, shipped: Path, rows: int, results: Path
) -> list[dict[str, Any]]:
    """Submit the job, follow it to its end and return its records."""
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
        job_id = client.submit_job(changes)["job_id"]
        say.status("demo", f"submitted {shipped / 'demo.yaml'} as job {job_id}")
        document = follow(client, state, job_id)
        if document["status"] == JobStatus.CANCELLED:
            raise JobCancelled(f"job {job_id} was cancelled")
        if document["status"] != JobStatus.COMPLETED:
            raise JobFailed(f"the demo's job failed: {document['error']}")
        client.download_result(job_id, results)
    with results.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


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
