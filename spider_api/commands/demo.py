"""``spider demo``: real jobs on an embedded fleet, from nothing to results."""

from __future__ import annotations

__all__ = ["demo"]

import os
import shutil
from pathlib import Path

import click

from spider_api.commands.demo_distil import run_distillation
from spider_api.commands.demo_job import DemoFleet
from spider_api.commands.demo_rollouts import run_rollouts
from spider_api.commands.reporting import Reporter
from spider_sdk.cli.options import pass_state
from spider_sdk.cli.state import Detached, State, json_option
from spider_sdk.errors import UsageError

ROLLOUTS, DISTIL = "rollouts", "distil"


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
@click.option(
    "--only",
    type=click.Choice((ROLLOUTS, DISTIL)),
    help="Run one of the two jobs alone.",
)
@click.option("--keep", is_flag=True, help="Keep the fleet's own folder (logs, Redis, artifacts).")
@json_option
@pass_state
def demo(state: State, rows: int, folder: Path, only: str | None, keep: bool) -> None:
    """Run two real jobs with small models on a fleet of its own, and stop everything again.

    The first has a model add two-digit numbers; processors build the prompts and check the sums.
    The second distils: a student that mostly cannot add learns it on its own samples, from a
    teacher with another tokenizer. The models ship with Spider, and nothing is downloaded.
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
            running = DemoFleet(fleet.base_url, fleet.api_key, shipped)
            if only != DISTIL:
                run_rollouts(state, say, running, rows, folder)
            if only != ROLLOUTS:
                run_distillation(state, say, running, folder / "distil")
    except (KeyboardInterrupt, Detached):
        raise Detached("stopped; everything that the demo started is gone") from None
    finally:
        if keep:
            state.say(f"The fleet's folder is {fleet_folder.absolute()}.")
        else:
            shutil.rmtree(fleet_folder, ignore_errors=True)
