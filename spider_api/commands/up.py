"""``spider up``: the embedded fleet, until Ctrl-C."""

from __future__ import annotations

__all__ = ["up"]

import os
import shlex
from pathlib import Path

import click

from spider_api.commands.reporting import Reporter
from spider_sdk.cli.options import pass_state
from spider_sdk.cli.state import State, json_option


@click.command()
@click.option(
    "--port",
    default=9000,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port of the API on 127.0.0.1 (0: any free one).",
)
@click.option(
    "--state",
    "folder",
    default=Path(".spider"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for everything that the fleet keeps.",
)
@click.option(
    "--queues",
    default="gpu",
    show_default=True,
    help="Queues that the workers serve, as after celery's -Q (gpu: all).",
)
@click.option(
    "--workers",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Number of worker processes.",
)
@click.option(
    "--data-root",
    "data_roots",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder under which jobs may name local models and data (repeatable).",
)
@json_option
@pass_state
def up(
    state: State,
    port: int,
    folder: Path,
    queues: str,
    workers: int,
    data_roots: tuple[Path, ...],
) -> None:
    """Start a fleet on this machine and keep it up until Ctrl-C.

    A Redis of its own, the API and the workers, with all their state in one folder. Stop it
    at any time and start it again: jobs go on where they were.
    """
    # Here, not above: Celery and redis take half a second that `spider up --help` can do without.
    from spider_api.embedded import EmbeddedFleet, FleetOptions, choose_sandbox
    from spider_worker.fleet.broker import check_queues

    check_queues(queues.split(","))
    say = Reporter(state)
    sandbox, warning = choose_sandbox(os.environ)
    if warning:
        say.warning(warning)
    options = FleetOptions(
        state=folder,
        port=port,
        queues=queues,
        workers=workers,
        data_roots=data_roots,
        sandbox=sandbox,
    )
    try:
        with EmbeddedFleet(options, say.status) as fleet:
            config = fleet.state.client_config
            say.document("ready", base_url=fleet.base_url, config=str(config))
            state.say(
                f"\nSpider is up at {fleet.base_url}. In another terminal:\n\n"
                f"    export SPIDER_CONFIG={shlex.quote(str(config))}\n"
                "    spider submit job.yaml --follow\n\n"
                f"Logs are in {fleet.state.path / 'logs'}. Ctrl-C stops everything."
            )
            fleet.wait()
    except KeyboardInterrupt:
        # Ctrl-C is how one ends this command, so it is no failure: exit code 0.
        say.document("stopped", state=str(folder))
        state.say(f"Stopped. `spider up --state {shlex.quote(str(folder))}` goes on from here.")
