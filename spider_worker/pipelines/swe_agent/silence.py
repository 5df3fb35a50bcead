"""Instances that end without a word of the model, one after the other: a server that went away
would use up the attempts of a whole data set."""

from __future__ import annotations

__all__ = ["Silence"]

from collections.abc import Mapping
from typing import Any, Final

from spider_sdk.errors import FatalJobError

#: Ends that say nothing about the model's server: others brought them about before it was heard.
_OTHERS: Final = frozenset({"cancelled", "workspace_error", "agent_error"})


class Silence:
    """Counts, in one runner, instances in a row whose last attempt had no answer of the model,
    where nothing else was the reason."""

    def __init__(self, model: str, *, limit: int = 5) -> None:
        self._model = model
        self._limit = limit
        self._row = 0

    def ended(self, record: Mapping[str, Any]) -> None:
        """An instance has ended with this record. Raises FatalJobError at the ``limit``-th in a
        row without an answer."""
        if any(message.get("role") == "assistant" for message in record["messages"]):
            self._row = 0
            return
        if record["status"] in _OTHERS:
            return
        self._row += 1
        if self._row >= self._limit:
            raise FatalJobError(
                f"{self._row} instances in a row ended without one answer of {self._model}; the "
                f"last one said: {record['error']}. What is done is kept: see to the model's "
                "server, and run the job again"
            )
