"""``spider preview``: what a job would ask and answer, on a few rows, before it is submitted."""

from __future__ import annotations

__all__ = ["preview"]

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spider_sdk.cli.options import env_option, load_config, pass_state, set_option
from spider_sdk.cli.state import State, json_option
from spider_sdk.config import AppConfig, parse_job
from spider_sdk.config.model import JobConfig
from spider_sdk.errors import ConfigError, JobFailed, UsageError
from spider_sdk.inputs import localise
from spider_sdk.records import RECORD_FIELDS, Record
from spider_sdk.settings import load
from spider_sdk.submission import Processors, Submittable
from spider_worker.settings import WorkerSettings

if TYPE_CHECKING:
    from spider_worker.commands.local_preview import Preview


_UNSET = "(not set)"


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-n", "rows", default=3, show_default=True, type=click.IntRange(1), help="Number of rows."
)
@click.option(
    "--pre-processor", metavar="FILE.PY:FUNCTION", help="Function that makes a prompt of a row."
)
@click.option(
    "--post-processor", metavar="FILE.PY:FUNCTION", help="Function that makes a record of a row."
)
@click.option(
    "--generate/--prompts-only",
    default=True,
    help="Generate where this machine can (the default), or only render the prompts.",
)
@set_option
@env_option
@json_option
@pass_state
def preview(
    state: State,
    config: Path,
    rows: int,
    pre_processor: str | None,
    post_processor: str | None,
    generate: bool,
    sets: tuple[str, ...],
    env: tuple[str, ...],
) -> None:
    """Run the first rows of the job that CONFIG describes on this machine.

    Renders the prompts through source and pre-processor, generates where the model can be had
    without a download, and runs the post-processor. Of a training job the student answers, as it
    is before it has learnt anything. Nothing is submitted or published. Exits with 1 where a row
    failed.
    """
    loaded = load_config(config, sets)
    if loaded.job is None:
        raise UsageError("a SWE job has no rows to preview: run it with max_instances: 1")
    processors = Processors.bundle(pre_processor, post_processor)
    ready, missing = _ready(loaded, processors, env)
    skip = None if generate else "only prompts were asked for"
    local = localise(ready.job)
    # Here, not above: `spider preview --help` needs neither engines nor data sets.
    from spider_worker.commands.local_preview import preview_job

    job = parse_job(local.job)
    assert isinstance(job, JobConfig)
    made = preview_job(
        job,
        rows,
        inputs={file.sha256: file.path for file in local.files},
        secrets=ready.env,
        settings=own_machine(load(WorkerSettings), config),
        skip=skip or missing,
    )
    show(state, made)
    failed = sum(record.get("error") is not None for record in made.records)
    if failed:
        raise JobFailed(f"{failed} of {len(made.records) + len(made.dropped)} rows failed")


def _ready(
    loaded: AppConfig, processors: Processors, env: tuple[str, ...]
) -> tuple[Submittable, str | None]:
    """The job as it would be submitted, and what is said of variables that are not set: they
    keep this machine from generating, and not from rendering prompts."""
    try:
        return Submittable.build(loaded, None, processors, env), None
    except ConfigError as error:
        names = [p.path.removeprefix("env.") for p in error.problems if p.path.startswith("env.")]
        if len(names) < len(error.problems):
            raise
        given = {name: os.environ.get(name) or _UNSET for name in {*env, *names}}
        ready = Submittable.build(loaded, None, processors, given)
        known = {name: value for name, value in ready.env.items() if value != _UNSET}
        # What only the Hub would need is not needed here.
        why = None if names == ["HF_TOKEN"] else error.message
        return dataclasses.replace(ready, env=known), why


def own_machine(settings: WorkerSettings, config: Path) -> WorkerSettings:
    """The user's own machine and files: a model beside the config, an endpoint on localhost."""
    roots = [settings.data_roots] if settings.data_roots else []
    roots += [str(Path.cwd()), str(config.resolve().parent)]
    return dataclasses.replace(settings, allow_private_urls=True, data_roots=os.pathsep.join(roots))


def show(state: State, made: Preview) -> None:
    """Rows on stdout, one JSON document each with ``--json``, and why there are no completions."""
    for record in made.records:
        if state.json:
            state.emit(_without_answer(record) if made.skipped else record)
        else:
            _say(state, record, generated=made.skipped is None)
    for index in made.dropped:
        if state.json:
            state.emit({"index": index, "dropped": True})
        else:
            state.say(click.style(f"── row {index}: dropped by a processor", bold=True))
    if made.skipped is not None:
        text = f"nothing was generated: {made.skipped}"
        if state.json:
            state.emit({"generated": False, "reason": made.skipped})
        else:
            state.note(text)


def _without_answer(record: Record) -> dict[str, Any]:
    answer = ("completion", "reasoning_content", "finish_reason", "usage")
    return {name: value for name, value in record.items() if name not in answer}


def _say(state: State, record: Record, *, generated: bool) -> None:
    state.say(click.style(f"── row {record['index']}", bold=True))
    for message in record.get("messages") or ():
        state.say(f"{click.style(message['role'], fg='cyan')}: {message.get('content')}")
    error = record.get("error")
    if error is not None:
        kind, message = str(error["type"]), str(error["message"])
        # An exception's name begins its text already.
        text = message if message.startswith(kind) else f"{kind}: {message}"
        state.say(f"{click.style('error in ' + error['stage'], fg='red')}: {text}")
        if error.get("traceback"):
            state.say(str(error["traceback"]).rstrip())
    if not generated:
        return
    for name, label in (("reasoning_content", "reasoning"), ("completion", "completion")):
        if record.get(name):
            state.say(f"{click.style(label, fg='green')}: {record[name]}")
    for name, value in record.items():
        if name not in RECORD_FIELDS:
            state.say(f"{click.style(name, fg='bright_black')}: {value}")
