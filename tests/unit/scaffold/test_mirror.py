"""A tree kept like the job's, as the job goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spider_scaffold.board import Board
from spider_scaffold.jobfile import JobFile
from spider_scaffold.mirror import Mirror
from spider_sdk.client import Client
from spider_sdk.errors import ServerUnreachable, UsageError
from spider_sdk.events import Event
from spider_worker.trajectories.layout import Layout
from spider_worker.trajectories.output_file import append, read, read_index
from tests.support.scripted_server import cut_before_answer, event, status_document
from tests.support.swe_jobs import Jobs, attempt


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def job() -> JobFile:
    return JobFile("http://s", "k", {}, job_id="j1")


@pytest.fixture
def client(jobs: Jobs) -> Iterator[Client]:
    with Client() as client:
        yield client


@pytest.fixture
def mirror(client: Client, job: JobFile, tmp_path: Path, clock: Clock) -> Mirror:
    return Mirror(client, job, Layout(tmp_path / "tree"), clock=clock)


def there(tmp_path: Path) -> list[tuple[str, int]]:
    return [(one.instance_id, one.attempt) for one in read(tmp_path / "tree/output.jsonl")]


def test_the_manifest_is_looked_at_when_something_ended_and_not_more_often(
    jobs: Jobs, mirror: Mirror, clock: Clock, tmp_path: Path
) -> None:
    jobs.run("a", attempt("a"))
    mirror.catch_up()
    assert there(tmp_path) == [("a", 1)]
    jobs.run("b", attempt("b"))
    clock.now = 60.0
    mirror.catch_up()
    assert there(tmp_path) == [("a", 1)]
    mirror.changed()
    mirror.catch_up()
    assert there(tmp_path) == [("a", 1), ("b", 1)]
    jobs.run("c", attempt("c"))
    mirror.changed()
    clock.now = 61.0
    mirror.catch_up()
    assert len(there(tmp_path)) == 2
    clock.now = 63.0
    mirror.catch_up()
    assert len(there(tmp_path)) == 3


def test_a_server_that_does_not_answer_is_asked_again(
    jobs: Jobs, mirror: Mirror, clock: Clock, tmp_path: Path
) -> None:
    jobs.run("a", attempt("a"))
    listed = jobs.server.routes["GET", "/v1/jobs/j1/artifacts"][0]
    jobs.server.on("GET", "/v1/jobs/j1/artifacts", cut_before_answer)
    mirror.catch_up()
    with pytest.raises(ServerUnreachable):
        mirror.sync()
    jobs.server.on("GET", "/v1/jobs/j1/artifacts", listed)
    clock.now = 60.0
    mirror.catch_up()
    assert there(tmp_path) == [("a", 1)]


def test_what_was_fetched_before_a_crash_is_not_added_twice(
    jobs: Jobs, client: Client, mirror: Mirror, job: JobFile, tmp_path: Path
) -> None:
    jobs.run("a", attempt("a"))
    assert mirror.sync() == 1
    job.taken.clear()  # the crash came before the job's file was written
    assert Mirror(client, job, Layout(tmp_path / "tree")).sync() == 0
    assert there(tmp_path) == [("a", 1)]


def test_attempts_of_earlier_jobs_are_counted_on(
    jobs: Jobs, mirror: Mirror, job: JobFile, tmp_path: Path
) -> None:
    job.bases = {"0 a": 3}
    jobs.run("a", attempt("a"), attempt("a", attempt=2))
    mirror.sync()
    assert there(tmp_path) == [("a", 4), ("a", 5)]


def test_a_run_that_was_done_before_the_job_still_counts(
    jobs: Jobs, client: Client, job: JobFile, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "tree")
    append(layout.output, attempt("a", cost=1.0, resolved=True))
    append(layout.output, attempt("b", "llm_error"))
    job.bases = {"0 a": 1, "0 b": 1}
    jobs.run("a", attempt("a", "llm_error", cost=2.0), attempt("a", attempt=2, cost=4.0))
    jobs.run("b", attempt("b"))
    Mirror(client, job, layout).sync()
    job.taken.clear()
    Mirror(client, job, layout).sync()
    index = read_index(layout.output)
    kept, made = (index.load(index.latest[name, 0]) for name in ("a", "b"))
    assert (kept.attempt, kept.resolved) == (1, True)
    assert (made.attempt, made.status) == (2, "finished")
    assert index.cost(("a", 0)) == (7.0, 0)


def test_a_verdict_that_came_later_is_fetched(jobs: Jobs, mirror: Mirror, tmp_path: Path) -> None:
    """And one that was made here is left alone."""
    jobs.run("a", attempt("a"))
    jobs.run("b", attempt("b", resolved=False))
    assert mirror.sync() == 2
    jobs.run("a", attempt("a", resolved=True), at="2026-01-02")
    jobs.run("b", attempt("b", resolved=True), at="2026-01-02")
    assert mirror.sync() == 1
    index = read_index(tmp_path / "tree/output.jsonl")
    assert {key[0]: entry.resolved for key, entry in index.latest.items()} == {
        "a": True,
        "b": False,
    }
    assert {key[0]: list(group) for key, group in index.attempts.items()} == {"a": [1], "b": [1]}


def test_a_tree_that_cannot_be_written(jobs: Jobs, mirror: Mirror, tmp_path: Path) -> None:
    jobs.run("a", attempt("a"))
    (tmp_path / "tree/output.jsonl").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"tree cannot be written"):
        mirror.sync()


def test_the_board_shows_who_is_at_work(mirror: Mirror, clock: Clock) -> None:
    board = Board(mirror, clock=clock)
    running = status_document("running")

    def told(code: str, **data: object) -> None:
        board.update(running, Event.from_json(event(1, code, **data)))

    told("instance.started", instance="a", n=0)
    told("instance.started", instance="a", n=1)
    told("progress", engine={"instance": "a", "n": 1, "attempt": 2, "turns": 7, "cost": 0.5})
    told("progress", metrics={})
    told("progress", engine={"rows": 3})
    clock.now = 75.0
    assert board.lines() == ["  a · 1m 15s", "  a (run 1) · attempt 2 · turn 7 · $0.50 · 1m 15s"]
    told("instance.judging", instance="a", n=1)
    assert "turn 7 · $0.50 · its tests run · 1m 15s" in board.lines()[1]
    told("instance.ended", instance="a", n=0)
    told("progress", engine={"instance": "a", "n": 0, "turns": 8})
    assert len(board.lines()) == 1
    told("instance.started", instance="a", n=0)
    assert len(board.lines()) == 2
    told("instance.ended", instance="a", n=0)
    for number in range(10):
        told("instance.started", instance=f"i{number}")
    assert len(board.lines()) == 9
    assert board.lines()[-1] == "  and 3 more"
    board.update(status_document("completed"), None)
    assert board.lines() == []


def test_what_was_put_off_is_fetched_while_the_job_is_silent(
    jobs: Jobs, mirror: Mirror, clock: Clock, tmp_path: Path
) -> None:
    board = Board(mirror, clock=clock)
    for name in ("a", "b"):
        jobs.run(name, attempt(name))
        board.update(status_document("running"), Event.from_json(event(1, "unit.committed")))
    assert there(tmp_path) == [("a", 1)]
    clock.now = 15.0
    board.rest()
    assert there(tmp_path) == [("a", 1), ("b", 1)]


def test_who_was_at_work_before_is_shown_once_heard_of(mirror: Mirror, clock: Clock) -> None:
    board = Board(mirror, clock=clock)
    said = {"instance": "a", "n": 1, "attempt": 2, "turns": 7, "cost": None}
    board.update(status_document("running"), Event.from_json(event(1, "progress", engine=said)))
    assert board.lines() == ["  a (run 1) · attempt 2 · turn 7"]
