"""What a sandbox is: a user's function in a process of its own, JSON rows in and out."""

from __future__ import annotations

__all__ = ["Outcome", "Sandbox"]

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from spider_sdk.errors import RowError


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What the function made of one row: ``value`` (any JSON value, None included), or
    ``error`` with the user's traceback where it raised, timed out or returned what is
    no JSON."""

    value: Any
    error: RowError | None = None


class Sandbox(Protocol):
    """One user function. Called from one event loop; calls may overlap and are queued."""

    async def start(self) -> None:
        """Start the process and define the function.

        Raises FatalJobError where the source does not define it (with the traceback),
        SandboxError where the process cannot be had, NotSupported where isolation is
        required and this host offers none.
        """

    async def call(self, rows: Sequence[dict[str, Any]]) -> list[Outcome]:
        """One outcome a row, in order. A row that kills or hangs the process costs that
        row only: the process is started again and the others go on."""

    async def stop(self) -> None:
        """End the process and everything it started. Idempotent."""
