"""Every error that Spider raises on purpose, as one tree.

::

    SpiderError
    ├── ConfigError              a job file is wrong; carries every problem at once
    ├── UsageError               a call or a command line that cannot be carried out
    ├── ServerUnreachable        no answer from the API (refused, timed out, cut off)
    ├── ApiError                 the API answered with a problem document
    │   ├── Unauthorized         401, 403: no key, or one that is not valid
    │   ├── NotFound             404: no such job, artifact or route for this key
    │   ├── Conflict             409, 422: the request contradicts what the server holds
    │   └── ServerBusy           429, 503: try again; nothing was accepted
    ├── JobFailed                a followed job ended as ``failed``
    ├── JobCancelled             a followed job ended as ``cancelled``
    ├── PollTimeout              ``poll_job`` ran out of its time; the job goes on
    ├── FleetError               the worker's side of the fleet (spider_worker.fleet)
    │   ├── LeaseLost            this writer's fence is stale: it must stop, at once
    │   ├── FleetUnavailable     Redis is down or full
    │   ├── IdempotencyConflict  the same Idempotency-Key came with another body
    │   ├── JobNotFound          no such job for this owner
    │   ├── ArtifactNotFound     the job's manifest names no such artifact
    │   └── IllegalTransition    e.g. a retry of a job that still runs
    └── PipelineError            raised by pipelines, engines, sources and sinks
        ├── FatalJobError        no retry can help: the job fails now, with this message
        │   ├── AuthError        an endpoint or the Hub refused the credentials
        │   ├── Diverged         training has ruined the student's weights
        │   ├── EngineUnavailable  package, device or model missing on this worker
        │   └── NotSupported     an option that this version cannot honour, by name
        ├── RowError             one row went wrong; recorded as an error row
        ├── SandboxError         the sandbox itself (not the user's code) failed
        └── WorkspaceError       the place where an agent or a test works could not be had

An exception's docstring is its default message. To add one: put it under the
narrowest parent that callers could want to catch, here, and draw it above.
"""

from __future__ import annotations

__all__ = [
    "ApiError",
    "ArtifactNotFound",
    "AuthError",
    "ConfigError",
    "Conflict",
    "Diverged",
    "EngineUnavailable",
    "FatalJobError",
    "FleetError",
    "FleetUnavailable",
    "IdempotencyConflict",
    "IllegalTransition",
    "JobCancelled",
    "JobFailed",
    "JobNotFound",
    "LeaseLost",
    "NotFound",
    "NotSupported",
    "PipelineError",
    "PollTimeout",
    "Problem",
    "RowError",
    "SandboxError",
    "ServerBusy",
    "ServerUnreachable",
    "SpiderError",
    "Unauthorized",
    "UsageError",
    "WorkspaceError",
]

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


class SpiderError(Exception):
    """Something went wrong in Spider."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").split("\n\n")[0].strip())

    @property
    def message(self) -> str:
        """What it says, with the notes that were added to it since."""
        return "; ".join((str(self.args[0]), *getattr(self, "__notes__", ())))


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong with a config: where it is, what it is, what would be right.

    ``path`` is dotted (``job.generation.parameters``); ``line`` counts from 1 and
    is None where the value did not come from a file.
    """

    path: str
    message: str
    line: int | None = None
    file: str | None = None

    def __str__(self) -> str:
        where = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        return f"{where}: {self.path}: {self.message}" if where else f"{self.path}: {self.message}"


class ConfigError(SpiderError):
    """The config is not valid."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class UsageError(SpiderError):
    """This call cannot be carried out as it was made."""


class ServerUnreachable(SpiderError):
    """The Spider server did not answer."""


class ApiError(SpiderError):
    """The server refused the request.

    ``status`` is the HTTP status, ``problem`` the RFC 9457 document (empty if the
    answer was none).
    """

    def __init__(
        self,
        message: str | None = None,
        *,
        status: int = 0,
        problem: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.problem = dict(problem or {})


class Unauthorized(ApiError):
    """The server does not accept this API key."""


class NotFound(ApiError):
    """There is no such thing on the server, or not for this key."""


class Conflict(ApiError):
    """The request contradicts what the server already holds."""


class ServerBusy(ApiError):
    """The server cannot take this now; nothing was accepted, so it is safe to repeat."""


class JobFailed(SpiderError):
    """The job failed."""


class JobCancelled(SpiderError):
    """The job was cancelled."""


class PollTimeout(SpiderError):
    """The job had not ended when the time for following it ran out; it goes on."""


class FleetError(SpiderError):
    """The fleet's record could not be read or changed."""


class LeaseLost(FleetError):
    """This attempt no longer holds its unit: another writer may be at work."""


class FleetUnavailable(FleetError):
    """The fleet's Redis is down or full."""


class IdempotencyConflict(FleetError):
    """This Idempotency-Key was used for another body."""


class JobNotFound(FleetError):
    """There is no such job."""


class ArtifactNotFound(FleetError):
    """The job has no such artifact."""


class IllegalTransition(FleetError):
    """The job's state does not allow this."""


class PipelineError(SpiderError):
    """A pipeline could not do its work; the unit is tried again."""


class FatalJobError(PipelineError):
    """The job cannot succeed as it stands."""


class Diverged(FatalJobError):
    """What a student answers with its present weights is no number: training has ruined them."""


class AuthError(FatalJobError):
    """The credentials were refused."""


class EngineUnavailable(FatalJobError):
    """This worker cannot run the engine that the job asks for."""


class NotSupported(FatalJobError):
    """This version cannot do what the job asks for."""


class RowError(PipelineError):
    """A row could not be processed.

    ``stage`` is ``pre_processor``, ``generation`` or ``post_processor``; ``kind`` the
    name of the original exception or a short code such as ``timeout``; ``trace`` the
    user's traceback, or None.
    """

    def __init__(
        self, message: str, *, stage: str, kind: str = "error", trace: str | None = None
    ) -> None:
        super().__init__(message)
        self.stage = stage
        self.kind = kind
        self.trace = trace


class SandboxError(PipelineError):
    """The sandbox process could not be started or broke."""


class WorkspaceError(PipelineError):
    """The place where an agent or a test was to work could not be made or used."""
