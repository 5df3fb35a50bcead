"""Commands on jobs that are on the server: status, list, logs, cancel, download."""

from __future__ import annotations

__all__ = ["cancel", "download", "list_jobs", "logs", "status"]

from pathlib import Path

import click

from spider_sdk.cli.options import connect, pass_state, server_options
from spider_sdk.cli.progress import Progress
from spider_sdk.cli.state import State, json_option
from spider_sdk.downloads import FORMATS
from spider_sdk.errors import UsageError
from spider_sdk.jobs import JobStatus, StatusDocument


@click.command()
@click.argument("job_id")
@server_options
@json_option
@pass_state
def status(state: State, job_id: str, config: Path | None, base_url: str | None) -> None:
    """Show a job as it stands."""
    with connect(config, base_url) as client:
        document = client.get_job_status(job_id)
    if state.json:
        state.emit(document)
    for line in _describe(document):
        state.say(line)


def _describe(document: StatusDocument) -> list[str]:
    lines = Progress(document).lines()
    lines.append(f"submitted {document['submitted_at']} · updated {document['updated_at']}")
    if document["error"]:
        lines.append(f"error: {document['error']}")
    if document["remote_artifact"]:
        lines.append(f"on the Hub: {document['remote_artifact']}")
    return lines


@click.command("list")
@click.option(
    "--status",
    "wanted",
    type=click.Choice([status.value for status in JobStatus]),
    help="Only jobs in this state.",
)
@click.option(
    "--limit", default=50, show_default=True, type=click.IntRange(1), help="At most so many."
)
@server_options
@json_option
@pass_state
def list_jobs(
    state: State, wanted: str | None, limit: int, config: Path | None, base_url: str | None
) -> None:
    """List your jobs, newest first."""
    with connect(config, base_url) as client:
        jobs = client.list_jobs(status=wanted, limit=limit)
    if state.json:
        for job in jobs:
            state.emit(job)
        return
    if not jobs:
        state.note("no jobs" if wanted is None else f"no {wanted} jobs")
    width = max((len(job["job_id"]) for job in jobs), default=0)
    for job in jobs:
        rows = Progress(job).lines()[0].partition(" · ")[2]
        line = f"{job['job_id']:<{width}}  {job['status']:<9}  {job['submitted_at']}  {rows}"
        state.say(line.rstrip())


@click.command()
@click.argument("job_id")
@server_options
@json_option
@pass_state
def logs(state: State, job_id: str, config: Path | None, base_url: str | None) -> None:
    """Print what a job's runners logged."""
    with connect(config, base_url) as client:
        text = client.logs(job_id)
    if state.json:
        state.emit({"job_id": job_id, "logs": text})
    elif text:
        state.say(text.removesuffix("\n"))
    else:
        state.note(f"job {job_id} has logged nothing yet")


@click.command()
@click.argument("job_id")
@server_options
@json_option
@pass_state
def cancel(state: State, job_id: str, config: Path | None, base_url: str | None) -> None:
    """Stop a job; what is finished is kept."""
    with connect(config, base_url) as client:
        answer = client.cancel_job(job_id)
    if state.json:
        state.emit(answer)
    elif answer["status"] in (JobStatus.QUEUED, JobStatus.RUNNING):
        state.say(f"job {job_id} is stopping")
    else:
        state.say(f"job {job_id} {answer['status']}")


@click.command()
@click.argument("job_id")
@click.option(
    "-o",
    "--output",
    default=".",
    type=click.Path(),
    help="File, whose suffix gives the format, or folder (default: the working folder).",
)
@click.option("--format", type=click.Choice(FORMATS), help="Format, whatever the suffix.")
@click.option(
    "--artifacts",
    "prefix",
    is_flag=False,
    flag_value="",
    default=None,
    metavar="[PREFIX]",
    help="Instead of its records, the files that the job made, or those whose names begin with "
    "PREFIX (adapter, checkpoints, curves.png, state): into the folder OUTPUT.",
)
@server_options
@json_option
@pass_state
def download(
    state: State,
    job_id: str,
    output: str,
    format: str | None,
    prefix: str | None,
    config: Path | None,
    base_url: str | None,
) -> None:
    """Download a job's results: all of it, or what there is so far.

    The records of an off-policy job; of a training run the metrics of its steps, and with
    --artifacts its adapter and curves.
    """
    if prefix is not None:
        if format is not None:
            raise UsageError("--format is of records, and --artifacts are files as they are")
        with connect(config, base_url) as client:
            paths = client.download_artifacts(job_id, output, prefix)
        for path in paths:
            if state.json:
                size = path.stat().st_size
                state.emit({"job_id": job_id, "downloaded": str(path), "bytes": size})
            state.say(str(path))
        return
    with connect(config, base_url) as client:
        path = client.download_result(job_id, output, format)
    if state.json:
        state.emit({"job_id": job_id, "downloaded": str(path), "bytes": path.stat().st_size})
    state.say(f"results are in {path}")
