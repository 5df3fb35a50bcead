"""``spider rebuild``: jobs again after Redis lost them. Run it where Redis and artifacts are."""

from __future__ import annotations

__all__ = ["rebuild"]

import click

from spider_sdk import settings
from spider_sdk.cli.options import pass_state
from spider_sdk.cli.state import State, json_option


@click.command()
@json_option
@pass_state
def rebuild(state: State) -> None:
    """Put back the jobs that a lost Redis knew, from their artifacts.

    Jobs that had ended are as they were; others are failed, and a retry runs what is missing.
    Reads SPIDER_REDIS_URL and SPIDER_ARTIFACTS. API keys are made anew with `spider keys create`.
    """
    # Here, not above: redis and celery take time that `--help` can do without.
    from spider_worker.fleet import Fleet
    from spider_worker.fleet.rebuild import rebuild as put_back
    from spider_worker.settings import FleetSettings

    fleet = Fleet.connect(settings.load(FleetSettings))
    try:
        found = put_back(fleet)
    finally:
        fleet.close()
    if state.json:
        state.emit({"rebuilt": found})
        return
    for job_id in found:
        state.say(job_id)
    state.note(f"{len(found)} jobs put back")
