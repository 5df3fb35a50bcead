"""Following jobs: ``watch`` and ``retry``, and what ``submit --follow`` does once it has a job."""

from __future__ import annotations

__all__ = ["Watcher", "conclude", "end_of_log", "follow", "retry", "watch"]

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from spider_sdk.cli.options import connect, env_option, pass_state, server_options
from spider_sdk.cli.progress import Progress, event_line, row_word
from spider_sdk.cli.state import Detached, State, json_option
from spider_sdk.client import Client
from spider_sdk.errors import JobCancelled, JobFailed
from spider_sdk.events import Event
from spider_sdk.jobs import JobStatus, StatusDocument
from spider_sdk.live import JobView

QUIET = frozenset({"progress", "train.step", "unit.claimed", "unit.committed"})
"""Events that the three lines on a terminal already show, a step's evaluation apart."""


class Watcher(Protocol):
    """Who else is told of a followed job."""

    def update(self, document: StatusDocument, event: Event | None) -> None:
        """The job as it stands after ``event`` (None: a snapshot)."""

    def rest(self) -> None:
        """The server is there and has nothing to tell: what was put off can be done."""

    def lines(self) -> list[str]:
        """What stands below the lines of progress on a terminal."""


def follow(
    client: Client,
    state: State,
    job_id: str,
    *,
    since: int = 0,
    again: str = "",
    watcher: Watcher | None = None,
) -> StatusDocument:
    """Show a job until it ends and return its final status document.

    Ctrl-C raises Detached, which says how to watch again (``again``: options that the command
    needs for it); the job goes on. ``watcher`` is called for each update, in between.
    """
    try:
        return _show(client, state, job_id, since, watcher)
    except KeyboardInterrupt:
        raise Detached(
            f"detached; job {job_id} goes on. Watch it again with: spider watch {job_id}{again}"
        ) from None


def _show(
    client: Client, state: State, job_id: str, since: int, watcher: Watcher | None
) -> StatusDocument:
    view = JobView(client.get_job_status(job_id, since=since))
    progress = Progress(view.document)
    with _screen(state, row_word(view.document), watcher) as screen:
        screen.draw(progress)
        for update in client.follow(job_id, since=since, beats=True):
            document = view.apply(update)
            progress.update(document, update.event)
            if update.event is not None:
                screen.event(update.event)
            if watcher is not None and update.quiet:
                watcher.rest()
            elif watcher is not None:
                watcher.update(document, update.event)
            screen.draw(progress)
            if update.final:
                break
    return view.document


class _Screen:
    """Where events go: JSON lines, or plain lines."""

    def __init__(self, state: State, word: str) -> None:
        self.state = state
        self.word = word  #: what a row of the job is called
        self._counts = ""

    def event(self, event: Event) -> None:
        if self.state.json:
            self.state.emit(event.to_json())
            return
        line = event_line(event, word=self.word)
        if event.code == "progress":
            metrics = event.data.get("metrics")
            if isinstance(metrics, Mapping) and "steps_done" in metrics:
                return  # of a training run, each step has an event of its own
            # Sent twice a second, whether a row was finished or not.
            counts = line.removeprefix(event.timestamp)
            if counts == self._counts:
                return
            self._counts = counts
        self.state.say(line)

    def draw(self, progress: Progress) -> None:
        """The three lines, where there is a terminal to hold them."""


class _LiveScreen(_Screen):
    def __init__(self, state: State, word: str, live: Live, watcher: Watcher | None) -> None:
        super().__init__(state, word)
        self._live = live
        self._watcher = watcher
        self._progress: Progress | None = None
        self._phase = ""
        self._since = time.monotonic()

    def event(self, event: Event) -> None:
        if event.code not in QUIET or "eval/kl" in event.data:
            style = {"error": "red", "warning": "yellow"}.get(event.level, "dim")
            self._live.console.print(
                Text(event_line(event, short=True, word=self.word), style=style)
            )

    def draw(self, progress: Progress) -> None:
        self._progress = progress
        if progress.phase != self._phase:
            self._phase, self._since = progress.phase, time.monotonic()
        self._live.update(self)

    def __rich__(self) -> Text:
        """Drawn several times a second, so that the seconds go on where nothing else does."""
        if self._progress is None:
            return Text("")
        lines = self._progress.lines(time.monotonic() - self._since)
        if self._watcher is not None:
            lines += self._watcher.lines()
        return Text("\n".join(lines))


@contextmanager
def _screen(state: State, word: str, watcher: Watcher | None) -> Iterator[_Screen]:
    console = Console()
    if state.json or not console.is_terminal:
        yield _Screen(state, word)
        return
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        yield _LiveScreen(state, word, live, watcher)


def conclude(client: Client, state: State, document: StatusDocument, again: str = "") -> None:
    """Say how a followed job ended, fetch results where the config asked for it.

    Raises JobFailed or JobCancelled, which carry the exit code.
    """
    job_id, status = document["job_id"], document["status"]
    if state.json:
        state.emit(document)
    if status == JobStatus.COMPLETED:
        if document["remote_artifact"]:
            state.say(f"on the Hub: {document['remote_artifact']}")
        saved = client.save_local(job_id)
        if saved is not None:
            if state.json:
                state.emit({"job_id": job_id, "downloaded": str(saved)})
            state.say(f"results are in {saved}")
        else:
            files = " --artifacts" if _trains(document) else ""
            state.say(f"download the results with: spider download {job_id}{files}{again}")
        errors = document["metrics"].get("rows_error")
        if errors and not _trains(document):
            word = row_word(document)
            what = f"1 {word}" if errors == 1 else f"{errors:.0f} {word}s"
            state.say(f"{what} failed, as the results tell; again: spider retry {job_id}{again}")
        left_out = document["metrics"].get("units_skipped")
        if left_out:
            state.say(
                f"the budget left {left_out:.0f} out; go on with: spider retry {job_id} "
                f"--max-budget-total DOLLARS{again}"
            )
        return
    kept = ""
    if document["metrics"].get("rows_done") or document["metrics"].get("steps_done"):
        files = " --artifacts" if _trains(document) else ""
        kept = f"; what is finished is kept: spider download {job_id}{files}{again}"
    if status == JobStatus.CANCELLED:
        raise JobCancelled(f"job {job_id} was cancelled{kept}")
    raise JobFailed(
        f"job {job_id} failed: {document['error'] or 'no reason given'}{kept}\n"
        f"its logs: spider logs {job_id}{again}"
    )


def _trains(document: StatusDocument) -> bool:
    generation = document["job"].get("generation")
    return isinstance(generation, dict) and generation.get("on_policy") is True


def options_again(config: Path | None, base_url: str | None) -> str:
    """The server options of this command line, to be repeated in a hint."""
    text = f" --base-url {base_url}" if base_url else ""
    return text + (f" -c {config}" if config else "")


@click.command()
@click.argument("job_id")
@click.option("--since", default=0, type=click.IntRange(0), help="Begin with this event.")
@server_options
@json_option
@pass_state
def watch(state: State, job_id: str, since: int, config: Path | None, base_url: str | None) -> None:
    """Follow a job until it ends. Ctrl-C leaves the job running."""
    again = options_again(config, base_url)
    with connect(config, base_url) as client:
        document = follow(client, state, job_id, since=since, again=again)
        conclude(client, state, document, again)


@click.command()
@click.argument("job_id")
@click.option("--follow/--detach", "following", default=False, help="Follow the job.")
@click.option(
    "--max-budget-total",
    "budget",
    type=click.FloatRange(0, min_open=True),
    metavar="DOLLARS",
    help="Raise a SWE job's budget; what it spent so far counts.",
)
@env_option
@server_options
@json_option
@pass_state
def retry(
    state: State,
    job_id: str,
    following: bool,
    budget: float | None,
    env: tuple[str, ...],
    config: Path | None,
    base_url: str | None,
) -> None:
    """Run the rows (of a SWE job: the instances) of an ended job that are missing or errored.

    The job's secrets are forgotten when it ends, so those that it needs are forwarded anew.
    """
    again = options_again(config, base_url)
    with connect(config, base_url, env=env) as client:
        since = end_of_log(client, job_id) if following else 0
        answer = client.retry_job(job_id, max_budget_total=budget)
        say_forwarded(state, client.forwarded)
        if state.json:
            state.emit(answer)
        state.say(f"job {job_id} {answer['status']}")
        if following:
            document = follow(client, state, job_id, since=since, again=again)
            conclude(client, state, document, again)
        else:
            state.say(f"follow it with: spider watch {job_id}{again}")


def end_of_log(client: Client, job_id: str) -> int:
    """The offset after the last event so far; the API gives events by the page."""
    since = 0
    while (document := client.get_job_status(job_id, since=since))["events"]:
        since = document["events_next_offset"]
    return since


def say_forwarded(state: State, names: tuple[str, ...]) -> None:
    """Name, on stderr, the variables that went along with a job."""
    if names:
        state.note(f"forwarded to the job, by name: {', '.join(names)}")
