"""The words between a tracker and the process that its SDK runs in.

``process.py`` speaks in lines of JSON to ``child.py``, which drives one Backend. Several jobs of
several owners share a runner, and an SDK keeps what it was told (keys, addresses, folders) for
the whole life of its process and may wait for a network without end: so each run has a process of
its own.
"""

from __future__ import annotations

__all__ = ["Backend", "Closing", "Opened", "RunSpec"]

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """A run as its backend needs it, without secrets: those are in the process's environment.

    ``run_id`` is the same in every attempt at a job. ``offline``: only files are written, under
    ``folder``. ``url`` is the service's address or ``owner/name`` of a Space (None: the SDK's
    own, or offline). ``entity`` None: the account's own. ``resume`` is the step that a run goes
    on from (None: a new run). ``patience`` is the most seconds that finishing may take.
    """

    kind: str  #: ``wandb`` or ``trackio``
    project: str
    run_id: str
    name: str
    folder: str
    offline: bool = False
    url: str | None = None
    entity: str | None = None
    resume: int | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    patience: float = 60.0


@dataclasses.dataclass(frozen=True)
class Opened:
    """``last`` is the last step that the tracker holds, None where it holds none; ``where`` is
    what to tell a user who looks for the run."""

    last: int | None
    where: str


@dataclasses.dataclass(frozen=True)
class Closing:
    """``files`` are to be kept with the job, by artifact name. ``hint`` says what to do with them.
    ``unsent``: why not everything reached the service, None where it did."""

    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hint: str | None = None
    unsent: str | None = None


class Backend(Protocol):
    """One SDK. Raises EngineUnavailable where its package is missing, AuthError, FatalJobError for
    what the service refuses, PipelineError where there is no answer; whatever else escapes counts
    as the last."""

    def check(self) -> None:
        """Everything that can be known before the first step. Logs nothing."""

    def start(self) -> Opened: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Steps come in order, each once, but for an evaluation that a step had later."""

    def finish(self, status: str) -> Closing:
        """``status`` is how training ended: ``failed``, or ``Progress.ended``."""
