"""The parts that the pipeline is put together from, each behind a function that builds it."""

from __future__ import annotations

__all__ = ["AdapterRepo", "ModelText", "Parts", "RunTracker"]

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from spider_sdk.config.model import JobConfig, ProcessorConfig, TeacherConfig
from spider_worker.distill.vocabulary import Vocabulary
from spider_worker.pipelines.base import JobContext
from spider_worker.sandbox.base import Sandbox
from spider_worker.sources.base import Source
from spider_worker.tokens import Ids, TokenEngine
from spider_worker.trainers.base import Trainer

Messages = Sequence[Mapping[str, Any]]


class ModelText(Protocol):
    """A model's tokenizer, as far as training asks of it."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def stops(self) -> tuple[int, ...]:
        """Token ids that end a turn."""

    def render(self, messages: Messages) -> list[int]:
        """The prompt that asks for the next turn. Raises RowError where the template refuses."""

    def decode(self, tokens: Ids) -> str:
        """Text, special tokens left out."""


class RunTracker(Protocol):
    """Where a run's metrics go besides its events. From the first step on nothing here raises."""

    def check(self) -> None:
        """Raise for whatever would keep a run from being tracked."""

    def start(self, metrics: Path) -> None:
        """Begin or go on. ``metrics`` has a record a line for each step made so far. Raises for a
        new run alone."""

    def log(self, step: int, metrics: Mapping[str, float], *, late: bool = False) -> None:
        """Does not block. ``late``: of a step that was logged before."""

    def finish(self, status: str | None) -> Mapping[str, Path]:
        """End the run, once however often it is called; None: another attempt has it by now.
        Returns files to be kept as artifacts."""


class AdapterRepo(Protocol):
    """A model repository on the Hub."""

    def check_access(self) -> None: ...

    def push(self, files: Mapping[str, Path], message: str) -> str: ...


@dataclasses.dataclass(frozen=True)
class Parts:
    """``trainer`` and ``source`` take the run's seed; neither ``trainer`` nor ``teacher``
    starts what it makes. ``checkpoint`` resolves the name of an adapter to start from, and
    refuses a folder that jobs may not name. ``student_text`` takes what
    ``TrainerInfo.tokenizer`` says. ``signals`` are those that an engine gives. ``self_test``
    raises FatalJobError for a teacher whose scores mean nothing. ``tracker`` takes the step
    that a run goes on from (None: a new run) and gives None where the job names no project;
    ``card`` makes the model card. ``source``, ``*_text``, ``tracker`` and ``draw`` may block. A
    state is saved at least every ``save_pace`` seconds (but never more often than a fiftieth of
    the time is spent on it)."""

    trainer: Callable[[JobContext, int], Trainer]
    checkpoint: Callable[[JobContext, str], str]
    student_text: Callable[[JobContext, str], ModelText]
    teacher: Callable[[JobContext, TeacherConfig], TokenEngine]
    teacher_text: Callable[[JobContext, TeacherConfig], ModelText]
    signals: Callable[[TokenEngine], frozenset[str]]
    self_test: Callable[[TokenEngine, ModelText, str], Awaitable[None]]
    source: Callable[[JobContext, int], Source]
    sandbox: Callable[[JobConfig, ProcessorConfig, str], Sandbox]
    tracker: Callable[[JobContext, int | None], RunTracker | None]
    repo: Callable[[JobContext], AdapterRepo]
    card: Callable[[JobContext, Mapping[str, Any]], str]
    draw: Callable[[Path, Path, str], None]
    save_pace: float = 60.0
