"""One row of a finished data set, as it is stored, downloaded and pushed to the Hub.

A record is a flat JSON object. Its own fields come first; the source row's columns
follow under their own names, and under ``source_<name>`` where that name is one of
the record's own. A post-processor that returns a dict replaces everything but
``id``, ``index`` and ``sample``; one that returns None drops the record. Where it raises,
the record keeps what was generated, and ``error`` says what went wrong.

=====================  ====================================================
``id``                 ``"{index}-{sample}"``, stable over retries
``index``              0-based position of the row in the selected source
``sample``             0-based number of the sample (``generation.duplications``)
``prompt``             the text a pre-processor or ``source.field`` gave, or None
``messages``           the conversation sent, OpenAI form
``completion``         the text generated; None where nothing was (an error of an
                       earlier stage than ``post_processor``)
``reasoning_content``  what the model thought, where it is told apart; or None
``finish_reason``      ``stop``, ``length``, …; None where nothing was generated
``usage``              ``{"prompt_tokens", "completion_tokens"}``, None if unknown
``error``              None, or ``{"stage", "type", "message", "traceback"}``; the stage is
                       ``source``, ``pre_processor``, ``generation`` or ``post_processor``
=====================  ====================================================
"""

from __future__ import annotations

__all__ = ["IDENTITY_FIELDS", "RECORD_FIELDS", "Record", "record_id"]

from typing import Any, Final

Record = dict[str, Any]

IDENTITY_FIELDS: Final = ("id", "index", "sample")
RECORD_FIELDS: Final = (
    *IDENTITY_FIELDS,
    "prompt",
    "messages",
    "completion",
    "reasoning_content",
    "finish_reason",
    "usage",
    "error",
)


def record_id(index: int, sample: int) -> str:
    """The stable id of the ``sample``-th completion for the ``index``-th row."""
    return f"{index}-{sample}"
