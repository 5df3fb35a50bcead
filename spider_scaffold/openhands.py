"""``spider-scaffold openhands``."""

from __future__ import annotations

__all__ = ["openhands"]

import contextlib
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spider_sdk.cli.options import pass_state, set_option
from spider_sdk.cli.state import State, json_option

if TYPE_CHECKING:
    from spider_scaffold.run import Run
    from spider_scaffold.servers import Place
    from spider_sdk.jobs import StatusDocument


@click.command()
@click.option(
    "-c",
    "--config",
    "config",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The SWE job.",
)
@click.option("--local", is_flag=True, help="Run it on a fleet of its own, whatever is set up.")
@click.option("--server", metavar="URL", help="Run it on this server.")
@click.option("--num-workers", type=click.IntRange(1), help="Instances at work at once.")
@click.option("--max-instances", type=click.IntRange(1), help="At most so many instances.")
@click.option("--instance-filter", metavar="REGEX", help="What ids must match from their start.")
@click.option("--eval-output-dir", metavar="DIR", help="Where the output tree begins.")
@click.option(
    "--workspace", type=click.Choice(["docker", "bwrap", "local"]), help="Where they work."
)
@click.option("--max-budget-total", type=float, metavar="DOLLARS", help="What the job may cost.")
@set_option
@json_option
@pass_state
def openhands(
    state: State,
    config: Path,
    local: bool,
    server: str | None,
    num_workers: int | None,
    max_instances: int | None,
    instance_filter: str | None,
    eval_output_dir: str | None,
    workspace: str | None,
    max_budget_total: float | None,
    sets: tuple[str, ...],
) -> None:
    """Have OpenHands agents work on the instances that the config selects.

    The job runs on the server that a flag, the config, SPIDER_BASE_URL or the user config names,
    else on a fleet that is started for it and ends with it. Its output tree grows in
    eval_output_dir as instances finish. Run the same command again to go on: what is done is
    left alone, what failed is tried again. Ctrl-C leaves a job on a server running, and stops a
    fleet that was started for it.
    """
    # Here, not above: `spider-scaffold openhands --help` should answer at once.
    from spider_scaffold.jobfile import locked
    from spider_scaffold.run import Run
    from spider_scaffold.servers import at, named_server
    from spider_sdk.config import AppConfig, parse_override

    flags = {
        "num_workers": num_workers,
        "max_instances": max_instances,
        "instance_filter": instance_filter,
        "eval_output_dir": eval_output_dir,
        "workspace": workspace,
        "max_budget_total": max_budget_total,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    loaded = AppConfig.load(config, given | dict(parse_override(text) for text in sets))
    where = named_server(loaded, local=local, server=server)
    run = Run(state, loaded)
    root = run.layout.root
    with locked(root):
        if run.nothing_left:
            _say_done(state, run)
            return
        again = _command(config, local, server, flags, sets)
        with at(state, loaded, where, root) as place:
            document = _to_its_end(state, run, place, again)
        if place.fleet is not None and (run.job is None or run.job.complete):
            shutil.rmtree(place.fleet, ignore_errors=True)
        _conclude(state, run, place, document)


def _command(
    config: Path,
    local: bool,
    server: str | None,
    flags: Mapping[str, object],
    sets: tuple[str, ...],
) -> str:
    """The command that was given, to be given again."""
    words = ["spider-scaffold", "openhands", "--config", str(config)]
    words += ["--local"] if local else []
    words += ["--server", server] if server else []
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    for text in sets:
        words += ["--set", text]
    return shlex.join(words)


def _to_its_end(state: State, run: Run, place: Place, again: str) -> StatusDocument:
    """Follow the job; its final status. What is done by then is in the tree."""
    from spider_scaffold.board import Board
    from spider_scaffold.mirror import Mirror
    from spider_sdk.cli.follow import follow
    from spider_sdk.cli.state import Detached
    from spider_sdk.errors import ServerBusy, ServerUnreachable

    mirror: Mirror | None = None
    try:
        since = run.begin(place)
        assert run.job is not None
        assert run.job.job_id is not None
        mirror, job_id = Mirror(place.client, run.job, run.layout), run.job.job_id
        document = follow(place.client, state, job_id, since=since, watcher=Board(mirror))
        mirror.sync()
    except (KeyboardInterrupt, Detached) as error:
        if isinstance(error, Detached) and (run.job is None or run.job.job_id is None):
            raise
        if mirror is not None:
            # A fleet in the tree goes now, and what ended since the last look would stay in it.
            with contextlib.suppress(ServerUnreachable, ServerBusy):
                mirror.sync()
        raise Detached(_how_to_go_on(run, place, again)) from None
    run.close(document)
    return document


def _how_to_go_on(run: Run, place: Place, command: str) -> str:
    done = f"what is finished so far is in {run.layout.root}"
    again = f"go on with: {command}"
    if place.server is None:
        return f"stopped; {done}. The job is kept there too; {again}"
    job_id = run.job.job_id if run.job is not None else None
    end = f"stop it with: spider cancel {job_id} --base-url {place.server}"
    return f"detached; job {job_id} goes on at {place.server}, and {done}; {again}; {end}"


def _conclude(state: State, run: Run, place: Place, document: StatusDocument) -> None:
    """Raises JobFailed or JobCancelled, which carry the exit code."""
    from spider_scaffold.report import counted, summary
    from spider_sdk.errors import JobCancelled, JobFailed
    from spider_sdk.jobs import JobStatus

    status, job_id = document["status"], document["job_id"]
    if state.json:
        state.emit(document)
    _say_tree(state, run)
    if status == JobStatus.CANCELLED:
        raise JobCancelled(f"job {job_id} was cancelled; run the same command again to go on")
    if status != JobStatus.COMPLETED:
        logs = f"spider logs {job_id} --base-url {place.server}"
        if place.fleet is not None:
            logs = str(place.fleet / "logs")
        said = document["error"] or "no reason given"
        raise JobFailed(f"job {job_id} failed: {said}\nits logs: {logs}")
    if document["remote_artifact"]:
        state.say(f"on the Hub: {document['remote_artifact']}")
    assert run.job is not None
    if run.job.carried and run.unpublished:
        _publish(state, run)
    left_out = document["metrics"].get("units_skipped")
    if left_out:
        state.say(f"the budget left {left_out:.0f} out: raise max_budget_total and run it again")
    counts = summary(run.index).statuses
    undone = sum(runs for name, (runs, _, _) in counts.items() if not _is_done(name))
    if undone:
        state.say(
            f"{counted(undone, 'run')} did not get to an end; run the same command again to retry"
        )


def _is_done(status: str) -> bool:
    from spider_worker.trajectories.record import is_done

    return is_done(status)


def _say_tree(state: State, run: Run) -> None:
    from spider_scaffold.report import summary

    made = summary(run.index)
    if state.json:
        state.emit({"output": str(run.layout.output), "summary": made.to_json()})
    for line in made.lines():
        state.say(line)
    state.say(f"results are in {run.layout.root}")


def _say_done(state: State, run: Run) -> None:
    _say_tree(state, run)
    state.say("nothing is left to do: every run is done")
    if run.unpublished:
        _publish(state, run)
    if run.swe.evaluate and (run.job is None or not run.job.asked.get("evaluate")):
        state.say(f"judge it with: spider-scaffold evaluate --input {run.layout.output}")


def _publish(state: State, run: Run) -> None:
    """Publish the tree as a whole, of which its last job had a part alone, or none."""
    from spider_scaffold.push import publish

    swe = run.swe
    assert swe.hf_repo_id is not None
    publish(
        state,
        run.layout.output,
        swe.hf_repo_id,
        private=swe.hf_private,
        config_name=swe.hf_config_name,
        push_filter=swe.push_filter,
        messages_format=swe.messages_format,
        token=os.environ.get("HF_TOKEN"),
        secrets=tuple(run.ready.env.values()),
    )
    run.note_published()
