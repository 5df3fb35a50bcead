"""The three lines of a followed job, and one line an event."""

from __future__ import annotations

import re
from typing import Any

import pytest

from spider_sdk.cli.progress import Progress, event_line
from spider_sdk.events import Event
from spider_sdk.live import JobView, Update
from tests.support.scripted_server import event, status_document


def advance(progress: Progress, view: JobView, second: int, **data: Any) -> None:
    raw = event(second, "progress", "unit-0", **data)
    raw["timestamp"] = f"2026-01-01T00:{second // 60:02d}:{second % 60:02d}.000Z"
    parsed = Event.from_json(raw)
    progress.update(view.apply(Update(event=parsed)), parsed)


@pytest.fixture
def view() -> JobView:
    return JobView(status_document("running", job_id="7f3a"))


def test_the_lines_of_the_design(view: JobView) -> None:
    progress = Progress(view.document)
    rows = {"rows_total": 1000, "rows_cached": 18, "rows_error": 3, "rows_dropped": 21}
    tokens = {"prompt_tokens": 1_200_000, "completion_tokens": 3_400_000, "cost_usd": 2.809}
    before = {"in_flight": 60, "limit": 64, "throttled": 0}
    advance(progress, view, 0, metrics={**rows, "rows_done": 374}, engine=before)
    now = {"in_flight": 24, "limit": 48, "throttled": 2}
    advance(progress, view, 60, metrics={**rows, **tokens, "rows_done": 412}, engine=now)
    assert progress.lines() == [
        "job 7f3a running · 412/1000 rows (18 cached) · 3 errors · 21 dropped",
        "38 rows/min · ETA 15m · in flight 24/48 (429 ×2, backing off)",
        "in 1.2M out 3.4M tokens · $2.81",
    ]


def test_what_is_waited_for_before_the_first_row_is_named(view: JobView) -> None:
    progress = Progress(view.document)

    def said(code: str, message: str) -> list[str]:
        parsed = Event.from_json(event(0, code, message))
        progress.update(view.apply(Update(event=parsed)), parsed)
        return progress.lines(waited=71.6)

    waits = ["job 7f3a running", "vllm loads Qwen/Qwen3-8B · 1m"]
    assert said("engine.starting", "vllm loads Qwen/Qwen3-8B") == waits
    assert said("unit.claimed", "rows-00001 taken by w2") == waits
    assert said("engine.ready", "loaded") == ["job 7f3a running"]


def test_rows_that_wait_for_a_retry_are_no_standstill(view: JobView) -> None:
    progress = Progress(view.document)
    for second, done in ((0, 0), (10, 997)):
        engine = {"in_flight": 0, "limit": 64, "throttled": 2, "waiting": 3}
        metrics = {"rows_done": done, "rows_total": 1000}
        advance(progress, view, second, metrics=metrics, engine=engine)
    assert progress.lines()[1] == "100 rows/s · in flight 0/64 (429 ×2, 3 to try again)"


def test_what_is_not_known_is_left_out(view: JobView) -> None:
    progress = Progress(view.document)
    assert progress.lines() == ["job 7f3a running"]
    advance(progress, view, 0, metrics={"rows_done": 1, "prompt_tokens": 10}, engine={})
    assert progress.lines() == ["job 7f3a running · 1 row", "in 10 out 0 tokens"]


def test_the_rate_is_of_the_last_minute_and_of_fresh_rows(view: JobView) -> None:
    progress = Progress(view.document)
    advance(progress, view, 0, metrics={"rows_done": 500, "rows_cached": 500, "rows_total": 9500})
    assert progress.rate is None
    for second in range(10, 200, 10):
        advance(progress, view, second, metrics={"rows_done": 500 + 20 * second})
    assert progress.rate == pytest.approx(20.0)
    assert progress.lines()[1] == "20 rows/s · ETA 4m"
    advance(progress, view, 600, metrics={"rows_done": 5000})
    assert progress.rate is not None
    assert progress.rate < 5


def test_a_retry_that_counts_anew_shows_no_rate_below_zero(view: JobView) -> None:
    progress = Progress(view.document)
    advance(progress, view, 0, metrics={"rows_done": 500})
    advance(progress, view, 10, metrics={"rows_done": 5})
    assert progress.rate is None


def test_an_event_is_one_line() -> None:
    plain = Event.from_json(event(1, "job.queued", "waiting\nfor a worker"))
    assert event_line(plain) == "2026-01-01T00:00:01Z info    job.queued      waiting for a worker"
    assert re.fullmatch(
        r"\d\d:\d\d:01  job.queued      waiting for a worker", event_line(plain, short=True)
    )
    metrics = {"rows_done": 4, "rows_total": 9, "rows_error": 1}
    progress = Event.from_json(event(2, "progress", "shard-0", metrics=metrics))
    assert event_line(progress).endswith("progress        4/9 rows · 1 error")


def test_the_lines_of_a_training_run(view: JobView) -> None:
    progress = Progress(view.document)
    counters = {"steps_total": 1000, "sampled_tokens": 1_200_000, "rows_error": 1}
    advance(progress, view, 0, metrics={**counters, "steps_done": 100}, engine={})
    raw = event(1, "train.step", "step 101", step=101, kl=0.21344, **{"eval/kl": 0.231})
    parsed = Event.from_json(raw)
    progress.update(view.apply(Update(event=parsed)), parsed)
    advance(progress, view, 84, metrics={**counters, "steps_done": 120}, engine={})
    assert progress.lines() == [
        "job 7f3a running · step 120/1000 · 1 row left out",
        "kl 0.2134 · held-out kl 0.2310 · 4.2 s a step · ETA 1h 02m",
        "1.2M sampled tokens",
    ]


def test_the_rows_of_a_swe_job_are_instances() -> None:
    swe = {"swe": {"llm_model": "m", "max_budget_total": 100}}
    view = JobView(status_document("running", job_id="7f3a", job=swe))
    progress = Progress(view.document)
    counts = {"rows_total": 50, "rows_error": 2, "rows_resolved": 5}
    advance(progress, view, 0, metrics={**counts, "rows_done": 10})
    tokens = {"prompt_tokens": 41e6, "completion_tokens": 6e5, "cost_usd": 27.131}
    advance(progress, view, 400, metrics={**counts, **tokens, "rows_done": 12})
    assert progress.lines() == [
        "job 7f3a running · 12/50 instances · 2 errors · 5 resolved",
        "18 instances/h · ETA 2h 07m",
        "in 41.0M out 600.0k tokens · $27.13 of $100.00",
    ]


def test_what_the_budget_left_out_is_counted() -> None:
    swe = {"swe": {"llm_model": "m"}}
    metrics = {"rows_total": 1, "rows_done": 0, "units_skipped": 1}
    view = JobView(status_document("completed", job_id="7f3a", job=swe, metrics=metrics))
    (line,) = Progress(view.document).lines()
    assert line == "job 7f3a completed · 0/1 instance · 1 left out (budget)"


def test_a_line_of_progress_calls_instances_by_their_name() -> None:
    raw = event(3, "progress", "unit-0", metrics={"rows_done": 2, "rows_total": 5})
    assert event_line(Event.from_json(raw), word="instance").endswith("2/5 instances")
