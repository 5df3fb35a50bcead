"""The line between a supervisor and its runner: JSON, one message a line, over two pipes.

Supervisor to runner:

===========  ==========================================================================
``unit``     a claim, with what the runner needs of its job and the job's secrets
``none``     there is nothing of the kinds that were asked for
``beat``     the leases are good; ``until`` is when the runner must be gone without another
``cancel``   the job is to stop: what is running returns within the pipeline's grace
``lost``     a claim was lost: drop that unit and write nothing
``stop``     the worker shuts down: give the units back and exit
===========  ==========================================================================

Runner to supervisor:

===========  ==========================================================================
``next``     asks for a unit of ``kinds``
``ended``    a claim is no longer held: committed, failed or given back
``grace``    the seconds that this job's pipeline may take to stop
``alive``    answers a beat: the runner's event loop turns
``idle``     nothing runs and nothing was to be had; the runner waits for another job
===========  ==========================================================================

``until`` is ``time.monotonic()``, which all processes of one host share: a beat that lay in
the pipe while its reader was stopped is worth no more than when it was sent.
"""

from __future__ import annotations

__all__ = ["LineReader", "Message", "redact", "send"]

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from spider_sdk.config.secrets import without_plain

Message = dict[str, Any]

#: Shorter values would blank out innocent text; no real secret is that short.
MIN_SECRET = 6


def send(descriptor: int, op: str, **fields: Any) -> None:
    """Write one message. Raises OSError (BrokenPipeError) where nobody reads."""
    data = json.dumps({"op": op, **fields}, separators=(",", ":")).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


class LineReader:
    """Messages from a pipe until its other end is closed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __iter__(self) -> Iterator[Message]:
        rest = b""
        while chunk := os.read(self._descriptor, 1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield json.loads(line)


def redact(text: str, secrets: Mapping[str, str]) -> str:
    """``text`` with every secret value replaced by its name (but not that of a plain setting)."""
    found = {
        part: name
        for name, value in without_plain(secrets).items()
        for part in (value, *value.splitlines())  # logs come line by line, keys in many
        if len(part) >= MIN_SECRET
    }
    # The longest first: one secret may begin with another.
    for part in sorted(found, key=len, reverse=True):
        text = text.replace(part, f"[{found[part]}]")
    return text
