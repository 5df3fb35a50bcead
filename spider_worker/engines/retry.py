"""When a failed request to an endpoint is tried again, and after how long.

Three kinds of failure, three budgets: an *error* (500, malformed JSON, a cut connection, a
timeout) has ``max_retries``; *throttling* (429) and an *outage* (nothing listens, after it
once did) may go on as long as somebody else's request succeeded within ``patience``
seconds, since waiting is then the right thing to do.
"""

from __future__ import annotations

__all__ = ["Failure", "FailureKind", "RetryPolicy"]

import dataclasses
import enum
import random
from typing import Final

_FIRST: Final = 0.1  # seconds before the first repetition
_ERROR_FACTOR: Final = 4.0  # 0.1, 0.4, 1.6, 6.4, 25.6: a blip costs little, a restart is outlived
_WAIT_FACTOR: Final = 2.0
_LONGEST: Final = 30.0


class FailureKind(enum.Enum):
    ERROR = "error"
    THROTTLED = "throttled"
    OUTAGE = "outage"


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """One failed try that may be repeated. ``code`` is a short name for the record
    (``http_500``, ``timeout``); ``retry_after`` is in seconds, None if not said;
    ``overload`` says that it is a sign of too much load."""

    kind: FailureKind
    code: str
    message: str
    retry_after: float | None = None
    overload: bool = False


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """``max_retries`` repetitions of errors; ``patience`` in seconds."""

    max_retries: int = 5
    patience: float = 600.0

    def delay(self, failure: Failure, repetition: int) -> float:
        """Seconds before ``repetition`` (from 1, counted within a kind). What the endpoint
        asks for is obeyed, a little later rather than earlier, so that not all come at once."""
        factor = _ERROR_FACTOR if failure.kind is FailureKind.ERROR else _WAIT_FACTOR
        backoff = min(_LONGEST, _FIRST * factor ** (repetition - 1))
        backoff *= random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
        if failure.retry_after is not None:
            return min(failure.retry_after, self.patience) + backoff * 0.5
        return backoff
