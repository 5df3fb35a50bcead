"""A tracker as the pipeline sees it: a run's metrics, sent by a process of their own.

The boundary of everything that may go wrong outside: from the first step on, a tracker that
fails costs a run its points there and nothing else. It is said once when it happens and again at
the end; ``metrics.jsonl`` always has everything.
"""

from __future__ import annotations

__all__ = ["TrackerProcess", "records"]

import contextlib
import dataclasses
import json
import logging
import math
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

from spider_sdk.errors import (
    AuthError,
    EngineUnavailable,
    FatalJobError,
    NotSupported,
    PipelineError,
    SpiderError,
)
from spider_worker.trackers.base import RunSpec

log = logging.getLogger(__name__)

#: ``JobContext.event``: level, code, message, data.
Say = Callable[[str, str, str, Mapping[str, Any] | None], None]

#: Seconds for an SDK to be imported and a service to answer; and beyond ``RunSpec.patience``.
ANSWER: Final = 120.0
_MARGIN: Final = 30.0
_SHORTEST: Final = 6  # characters: a shorter secret would blank out innocent text
_ERRORS: Final[Mapping[str, type[SpiderError]]] = {
    error.__name__: error
    for error in (AuthError, EngineUnavailable, FatalJobError, NotSupported, PipelineError)
}


class TrackerProcess:
    """A ``RunTracker``. ``env`` is the whole environment of the process; ``secrets`` are values
    that no message may show. All but ``log`` block."""

    def __init__(
        self,
        spec: RunSpec,
        *,
        env: Mapping[str, str],
        say: Say,
        secrets: tuple[str, ...] = (),
        answer: float = ANSWER,
    ) -> None:
        self.spec = spec
        self.env = dict(env)
        self._say = say
        self._secrets = secrets
        self._patience = answer
        self._folder = Path(spec.folder)
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._running = self._closing = False
        self._lock = threading.Lock()
        self._lost: str | None = None
        self._floor: int | None = None  # the last step that is there already

    def check(self) -> None:
        """Everything that can be known before the first step: the package, the service, the key.
        Raises EngineUnavailable, AuthError, FatalJobError, or PipelineError where the service
        does not answer."""
        try:
            self._launch("check")
            self._answer(self._patience)
        finally:
            self._end()

    def start(self, metrics: Path) -> None:
        """Begin the run or go on with it. ``metrics`` holds a record a line for each step that
        was made so far; those that the tracker lacks are logged again.

        Raises the errors of ``check`` for a new run. One that goes on does so without its
        tracker."""
        try:
            self._launch("start")
            opened = self._answer(self._patience)
        except SpiderError as error:
            self._end()
            if self.spec.resume is None:
                raise
            self._lose(error.message)
            return
        self._floor = opened["last"]
        self._running = True
        self._tell("info", "tracker.started", f"metrics go to {opened['where']}")
        first = 0 if self.spec.resume is None else self.spec.resume + 1
        if self._floor is not None and self._floor >= first:
            self._tell(
                "warning",
                "tracker.kept",
                f"{opened['where']} holds steps {first} to {self._floor} of an attempt that was"
                " lost, and takes no step twice; metrics.jsonl has the steps that count",
            )
        for step, figures in records(metrics):
            self.log(step, figures)

    def log(self, step: int, metrics: Mapping[str, float], *, late: bool = False) -> None:
        """Neither blocks nor raises. Steps that the tracker holds already are left out, and so
        are figures that are no finite numbers. ``late``: of a step that was logged before."""
        known = not late and self._floor is not None and step <= self._floor
        if self._running and self._lost is None and not known:
            self._outbox.put({"step": step, "metrics": _figures(metrics)})

    def finish(self, status: str | None) -> dict[str, Path]:
        """End the run; with None leave it as it is, since another attempt has it by now. Returns
        files to be kept with the job, by artifact name: what was recorded offline, or could not be
        sent. Never raises; the second time there is nothing to do."""
        if self._closing:
            return {}
        self._closing = True
        if status is None:
            self._end()
            return {}
        closing: Mapping[str, Any] = {"files": {}, "hint": None, "unsent": None}
        try:
            if self._running and self._lost is None:
                self._outbox.put({"finish": status})
                closing = self._answer(self.spec.patience + _MARGIN)
        except SpiderError as error:
            self._lose(error.message)
        finally:
            self._end()
        why = self._lost or closing["unsent"]
        if why is not None:
            said = f"the run is not complete at its tracker ({why}); metrics.jsonl has every step"
            self._tell("warning", "tracker.incomplete", said)
        files = {name: Path(path) for name, path in closing["files"].items()}
        for name in files:
            self._tell("info", "tracker.file", f"the run is kept as {name}; {closing['hint']}")
        return files

    # -- the process ---------------------------------------------------------------

    def _launch(self, task: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._answers, self._outbox = queue.SimpleQueue(), queue.SimpleQueue()
        try:
            with (self._folder / "tracker.log").open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "spider_worker.trackers.child"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    cwd=self._folder,
                    env=self.env,
                    encoding="utf-8",
                )
        except OSError as error:
            said = f"the process of {self.spec.kind} could not be started: {error}"
            raise PipelineError(said) from error
        self._outbox.put({"do": task, "spec": dataclasses.asdict(self.spec)})
        for target, pipe, box in (
            (_write, self._process.stdin, self._outbox),
            (self._read, self._process.stdout, self._answers),
        ):
            threading.Thread(target=target, args=(pipe, box), daemon=True).start()

    def _read(self, pipe: IO[str], answers: queue.SimpleQueue[Any]) -> None:
        answer = None
        with pipe:
            for line in pipe:
                answer = json.loads(line)
                answers.put(answer)
        answers.put(None)
        if self._running and not self._closing:
            self._lose(self._reason(answer).message)

    def _answer(self, seconds: float) -> Mapping[str, Any]:
        """The process's next answer. Raises the error that it is, PipelineError for none."""
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            said = f"{self.spec.kind} did not answer within {seconds:.0f} s"
            raise PipelineError(said) from None
        if answer is None or "error" in answer:
            raise self._reason(answer)
        return answer

    def _reason(self, answer: Mapping[str, Any] | None) -> SpiderError:
        """Why it ended; ``answer`` is its last."""
        if answer is None or "error" not in answer:
            return PipelineError(f"{self.spec.kind} ended by itself{self._last_words()}")
        return _ERRORS.get(answer["error"], PipelineError)(self._clean(answer["message"]))

    def _last_words(self) -> str:
        lines = (self._folder / "tracker.log").read_text("utf-8", "replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return f": {self._clean(said[-1])[:500]}" if said else ""

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            if len(secret) >= _SHORTEST:
                text = text.replace(secret, "***")
        return text

    def _end(self) -> None:
        self._outbox.put(None)
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    # -- what is said --------------------------------------------------------------

    def _lose(self, why: str) -> None:
        with self._lock:
            if self._lost is not None:
                return
            self._lost = why
        said = f"training goes on without its tracker ({why}); metrics.jsonl has every step"
        self._tell("warning", "tracker.lost", said)

    def _tell(self, level: str, code: str, message: str) -> None:
        try:
            self._say(level, code, message, None)
        except SpiderError as error:
            # The lease is lost, or Redis: whoever trains will hear of it in a better place.
            log.warning("%s could not be said: %s", code, error.message)


def records(metrics: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Steps and figures of a ``metrics.jsonl``; null and what is no number is left out."""
    with metrics.open("rb") as file:
        for line in file:
            record = json.loads(line)
            yield int(record["step"]), _figures(record)


def _figures(record: Mapping[str, Any]) -> dict[str, float]:
    """A step's finite numbers by name. ``step`` itself is no figure: trackers know it as such."""
    return {
        name: float(value)
        for name, value in record.items()
        if name != "step"
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }


def _write(pipe: IO[str], outbox: queue.SimpleQueue[Any]) -> None:
    """A thread of its own: a pipe whose reader is stuck blocks its writer."""
    with contextlib.suppress(OSError), pipe:
        while (message := outbox.get()) is not None:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()
