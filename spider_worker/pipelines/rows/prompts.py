"""From a source row to the conversation that is sent.

Without a pre-processor, ``source.field`` names the column: a string becomes one user message,
a list of messages is the conversation. A pre-processor returns one of

========  ============================================================================
str       the text of one user message
list      the conversation, OpenAI form
dict      ``messages`` (a list) or ``prompt`` (a string) is what is sent, both removed from
          the dict; with neither, ``source.field`` of the merged row is. Its other keys are
          added to the row's fields, over columns of the same name
None      the row is dropped
========  ============================================================================

``generation.system_prompt`` comes first, unless the conversation brings a system message of its
own there.
"""

from __future__ import annotations

__all__ = ["Message", "Prepared", "Preparer"]

import dataclasses
from typing import Any

from spider_sdk.errors import RowError
from spider_worker.sandbox.base import Outcome
from spider_worker.sources.base import Row

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """``prompt`` is the text sent where it was one, else None; ``fields`` the row's columns as
    the record shall carry them."""

    prompt: str | None
    messages: list[Message]
    fields: Row


class Preparer:
    """Makes conversations. ``field`` and ``system_prompt`` as in the config."""

    def __init__(self, field: str | None, system_prompt: str | None) -> None:
        self._field = field
        self._system = (
            None if system_prompt is None else {"role": "system", "content": system_prompt}
        )

    def from_row(self, row: Row) -> Prepared:
        """Without a pre-processor. Raises RowError (stage ``source``)."""
        if self._field is None or self._field not in row:
            raise RowError(
                f"the row has no field {self._field!r}; it has {', '.join(sorted(row))}",
                stage="source",
                kind="missing_field",
            )
        return self._conversation(row[self._field], row, f"field {self._field!r}", "source")

    def from_outcome(self, row: Row, outcome: Outcome) -> Prepared | None:
        """With a pre-processor; None where it dropped the row. Raises RowError."""
        if outcome.error is not None:
            raise outcome.error
        value = outcome.value
        if value is None:
            return None
        what, stage = "the pre-processor's answer", "pre_processor"
        if not isinstance(value, dict):
            return self._conversation(value, row, what, stage)
        extra = dict(value)
        prompt, messages = extra.pop("prompt", None), extra.pop("messages", None)
        fields = {**row, **extra}
        if messages is not None:
            made = self._conversation(messages, fields, what + " 'messages'", stage)
            return dataclasses.replace(made, prompt=prompt) if isinstance(prompt, str) else made
        if prompt is not None:
            return self._conversation(prompt, fields, what + " 'prompt'", stage)
        if self._field is None or self._field not in fields:
            raise RowError(
                "the pre-processor returned a dict with neither 'messages' nor 'prompt', and"
                f" the row has no source.field ({self._field!r}) to take instead",
                stage=stage,
                kind="no_prompt",
            )
        return self._conversation(fields[self._field], fields, f"field {self._field!r}", stage)

    def _conversation(self, value: Any, fields: Row, what: str, stage: str) -> Prepared:
        prompt: str | None = None
        if isinstance(value, str):
            prompt = value
            messages: list[Message] = [{"role": "user", "content": value}]
        elif _is_conversation(value):
            messages = value
        else:
            raise RowError(
                f"{what} is {_shape(value)}; expected a string or a list of messages"
                ' ({"role": …, "content": …})',
                stage=stage,
                kind="bad_prompt",
            )
        if self._system is not None and messages[0]["role"] != "system":
            messages = [self._system, *messages]
        return Prepared(prompt, messages, fields)


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(item, dict) and isinstance(item.get("role"), str) for item in value)
    )


def _shape(value: Any) -> str:
    if isinstance(value, list):
        return "a list that is no conversation" if value else "an empty list"
    names = {"NoneType": "null", "dict": "an object", "bool": "a boolean"}
    return names.get(type(value).__name__, f"of type {type(value).__name__}")
