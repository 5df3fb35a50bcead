"""What a followed job looks like: three lines on a terminal, one line an event elsewhere.

``Progress`` turns updates into text and knows neither terminal nor network::

    job 7f3a running · 412/1000 rows (18 cached) · 3 errors · 21 dropped
    38 rows/min · ETA 15m · in flight 24/64 (429 ×2, backing off)
    in 1.2M out 3.4M tokens · $2.81

and of a training run::

    job 7f3a running · step 120/1000
    kl 0.2134 · held-out kl 0.2310 · score 0.871 · 4.2 s a step · ETA 1h 02m
    1.2M sampled tokens

and of a SWE job, whose rows are instances::

    job 7f3a running · 12/50 instances · 2 errors · 5 resolved
    18 instances/h · ETA 2h 07m
    in 41.0M out 0.6M tokens · $27.13 of $100.00
"""

from __future__ import annotations

__all__ = ["Progress", "event_line", "row_word"]

import collections
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from spider_sdk.events import Event
from spider_sdk.jobs import StatusDocument

PHASES = frozenset(
    {
        "job.queued", "job.running", "job.planning", "job.planned", "engine.starting",
        "trainer.starting", "teacher.starting",
    }
)  # fmt: skip
"""Events that say what is waited for; the next one of a job, an engine or a trainer ends it."""
ENDING = ("job.", "engine.", "trainer.", "teacher.", "train.")
FIGURES = {"kl": "kl {:.4f}", "eval/kl": "held-out kl {:.4f}", "eval/score": "score {:.3f}"}
"""What is shown of a training step, and how."""
WINDOW = 60.0
"""Seconds over which the rate is taken."""


class Progress:
    """The state behind the three lines. Times are the server's, from events."""

    def __init__(self, document: StatusDocument) -> None:
        self._document = document
        self._samples: collections.deque[tuple[float, float]] = collections.deque()
        self._engine: Mapping[str, Any] = {}
        self._figures: dict[str, float] = {}  #: the newest of a training run, by name
        self._widest = 0
        self.phase = ""  #: what is waited for before the first row, in words

    def update(self, document: StatusDocument, event: Event | None) -> None:
        """Take in the job as it stands after ``event`` (None: a snapshot)."""
        self._document = document
        if event is None:
            return
        if event.code in PHASES:
            self.phase = event.message
        elif event.code == "progress" or event.code.startswith(ENDING):
            self.phase = ""
        if event.code == "train.step":
            self._figures |= {
                name: float(event.data[name])
                for name in FIGURES
                if isinstance(event.data.get(name), int | float)
            }
        if event.code != "progress":
            return
        engine = event.data.get("engine")
        if isinstance(engine, Mapping):
            self._engine = engine
            self._widest = max(self._widest, int(engine.get("limit") or 0))
        metrics = document["metrics"]
        fresh = metrics.get("rows_done", 0) - metrics.get("rows_cached", 0)
        fresh += metrics.get("steps_done", 0)
        now = _seconds(event.timestamp)
        if now is None:
            return
        self._samples.append((now, fresh))
        while now - self._samples[0][0] > WINDOW and len(self._samples) > 2:
            self._samples.popleft()

    def lines(self, waited: float = 0.0) -> list[str]:
        """Up to three lines; what is not known is left out. ``waited`` is for how many seconds
        the phase lasts already."""
        lines = [self._rows()]
        if self.phase:
            lines.append(f"{self.phase} · {_duration(waited)}")
        elif self._trains:
            lines.append(" · ".join((*self._learnt(), *self._step_pace())))
        elif self._document["status"] == "running":
            lines.append(" · ".join(part for part in (*self._pace(), self._flight()) if part))
        lines.append(" · ".join(part for part in (self._tokens(), self._cost()) if part))
        return [line for line in lines if line]

    @property
    def rate(self) -> float | None:
        """Rows a second that were made (not taken over), None until two events tell."""
        if len(self._samples) < 2:
            return None
        (start, before), (end, after) = self._samples[0], self._samples[-1]
        if end <= start or after < before:
            return None
        return (after - before) / (end - start)

    @property
    def _stalled(self) -> bool:
        """Nothing is being generated: the rate so far tells nothing of the rows that are left."""
        return self._engine.get("in_flight") == 0

    @property
    def _word(self) -> str:
        return row_word(self._document)

    @property
    def _trains(self) -> bool:
        return "steps_done" in self._document["metrics"]

    def _learnt(self) -> list[str]:
        return [
            text.format(self._figures[name])
            for name, text in FIGURES.items()
            if name in self._figures
        ]

    def _step_pace(self) -> list[str]:
        rate = self.rate
        if not rate or self._document["status"] != "running":
            return []
        parts = [f"{1 / rate:.1f} s a step" if rate < 1 else f"{rate:.1f} steps/s"]
        metrics = self._document["metrics"]
        if metrics.get("steps_total") is not None:
            left = max(0.0, metrics["steps_total"] - metrics["steps_done"])
            parts.append(f"ETA {_duration(left / rate)}")
        return parts

    def _rows(self) -> str:
        metrics = self._document["metrics"]
        parts = [f"job {self._document['job_id']} {self._document['status']}"]
        counted = row_counts(metrics, self._word)
        return " · ".join(parts + counted)

    def _pace(self) -> list[str]:
        rate = self.rate
        if not rate:
            return []
        parts = [_pace(rate, f"{self._word}s")]
        metrics = self._document["metrics"]
        if metrics.get("rows_total") is not None:
            left = metrics["rows_total"] - metrics.get("rows_done", 0)
            if not self._stalled:
                parts.append(f"ETA {_duration(max(0.0, left) / rate)}")
        return parts

    def _flight(self) -> str:
        if "in_flight" not in self._engine:
            return ""
        limit = int(self._engine.get("limit") or 0)
        text = f"in flight {self._engine['in_flight']}" + (f"/{limit}" if limit else "")
        notes = []
        if self._engine.get("throttled"):
            notes.append(f"429 ×{self._engine['throttled']}")
        if self._engine.get("waiting"):
            notes.append(f"{self._engine['waiting']} to try again")
        if 0 < limit < self._widest:
            notes.append("backing off")
        return f"{text} ({', '.join(notes)})" if notes else text

    def _tokens(self) -> str:
        metrics = self._document["metrics"]
        if metrics.get("sampled_tokens"):
            return f"{_count(metrics['sampled_tokens'])} sampled tokens"
        read, written = metrics.get("prompt_tokens"), metrics.get("completion_tokens")
        if not read and not written:
            return ""
        return f"in {_count(read or 0)} out {_count(written or 0)} tokens"

    def _cost(self) -> str:
        cost = self._document["metrics"].get("cost_usd")
        budget = (self._document["job"].get("swe") or {}).get("max_budget_total")
        most = "" if budget is None else f" of ${budget:.2f}"
        return "" if cost is None else f"${cost:.2f}{most}"


def row_word(document: StatusDocument) -> str:
    """What a row of the job is called."""
    return "instance" if "swe" in document["job"] else "row"


def row_counts(metrics: Mapping[str, Any], word: str = "row") -> list[str]:
    """``412/1000 rows (18 cached)``, ``3 errors``, ``21 dropped``; what is zero is left out. Of a
    training run its steps. ``word`` is what a row is called."""
    if metrics.get("steps_done") is not None:
        return _step_counts(metrics)
    done, total = metrics.get("rows_done"), metrics.get("rows_total")
    if done is None and total is None:
        return []
    text = f"{done or 0:.0f}" + (f"/{total:.0f}" if total is not None else "")
    text += f" {word}" if (done if total is None else total) == 1 else f" {word}s"
    if metrics.get("rows_cached"):
        text += f" ({metrics['rows_cached']:.0f} cached)"
    parts = [text]
    if metrics.get("rows_error"):
        plural = "" if metrics["rows_error"] == 1 else "s"
        parts.append(f"{metrics['rows_error']:.0f} error{plural}")
    if metrics.get("rows_dropped"):
        parts.append(f"{metrics['rows_dropped']:.0f} dropped")
    if metrics.get("rows_resolved"):
        parts.append(f"{metrics['rows_resolved']:.0f} resolved")
    if metrics.get("units_skipped"):
        parts.append(f"{metrics['units_skipped']:.0f} left out (budget)")
    return parts


def _pace(rate: float, words: str) -> str:
    if rate >= 10:
        return f"{rate:.0f} {words}/s"
    return f"{rate * 60:.0f} {words}/min" if rate * 60 >= 1 else f"{rate * 3600:.0f} {words}/h"


def _step_counts(metrics: Mapping[str, Any]) -> list[str]:
    """``step 120/1000``, and how many rows were left out of the training."""
    total = metrics.get("steps_total")
    parts = [f"step {metrics['steps_done']:.0f}" + (f"/{total:.0f}" if total is not None else "")]
    left_out = metrics.get("rows_error", 0) + metrics.get("rows_dropped", 0)
    if left_out:
        parts.append(f"{left_out:.0f} row{'' if left_out == 1 else 's'} left out")
    return parts


def event_line(event: Event, *, short: bool = False, word: str = "row") -> str:
    """One event on one line: time, level, code, message. ``short`` gives the time of day here
    and leaves the level out, for a terminal that shows it in colour. ``word`` is what a row is
    called."""
    message = event.message
    metrics = event.data.get("metrics")
    if event.code == "progress" and isinstance(metrics, Mapping):
        message = " · ".join(row_counts(metrics, word)) or message
    text = " ".join(message.splitlines())
    if short:
        return f"{_time_of_day(event.timestamp)}  {event.code:<15} {text}".rstrip()
    return f"{event.timestamp} {event.level:<7} {event.code:<15} {text}".rstrip()


def _time_of_day(timestamp: str) -> str:
    try:
        return datetime.fromisoformat(timestamp).astimezone().strftime("%H:%M:%S")
    except ValueError:
        return timestamp


def _seconds(timestamp: str) -> float | None:
    try:
        return datetime.fromisoformat(timestamp).timestamp()
    except ValueError:
        return None


def _duration(seconds: float) -> str:
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{(whole + 30) // 60}m"
    hours, minutes = divmod((whole + 30) // 60, 60)
    return f"{hours}h {minutes:02d}m"


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"
