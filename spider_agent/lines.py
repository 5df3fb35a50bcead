"""The words between an episode and its worker: one JSON object a line, each way.

In, once: a ``Request``. Out, of which the first event and the tools may come before ``ready``:

- ``{"op": "ready"}``: the model is asked next, while the shell still comes up; the clock of the
  episode may start;
- ``{"op": "event", "event": {…}}``: an event of the conversation, as the SDK writes it;
- ``{"op": "messages", "keep": n, "messages": […]}``: of what the model has seen and said so far,
  the first ``n`` messages are as they were told before, and these follow;
- ``{"op": "tools", "tools": […]}``: the tools as the model is shown them, once;
- ``{"op": "metrics", "turns": n, "metrics": {…}}``: after each answer of the model;
- ``{"op": "end", "status": …, "error": …}``: the last line.
"""

from __future__ import annotations

__all__ = ["STATUSES", "LineWriter", "Request", "read_request"]

import dataclasses
import json
import threading
from typing import IO, Any

#: How an episode may end by itself. The worker adds its own: ``timeout``, ``cancelled``,
#: ``workspace_error``, and for one that finished ``empty_patch`` and ``unusable_patch``.
STATUSES = (
    "finished",
    "stuck",
    "max_iterations",
    "max_budget",
    "context_window",
    "llm_refused",
    "llm_error",
    "agent_error",
)


@dataclasses.dataclass(frozen=True)
class Request:
    """``llm`` are what ``spider_agent.llm.make_llm`` takes, the key among them. ``path`` is the
    folder to work in, ``state`` one for the SDK's own files. ``max_budget`` None: no cap;
    ``condenser`` is False, True (the SDK's default) or arguments of its summarising one."""

    instruction: str
    path: str
    state: str
    llm: dict[str, Any]
    max_iterations: int
    max_budget: float | None = None
    condenser: bool | dict[str, Any] = False


def read_request(stream: IO[str]) -> Request:
    """The request that stands on the first line. Raises ValueError where it is none."""
    line = stream.readline()
    if not line.endswith("\n"):
        raise ValueError("the request was cut off")
    return Request(**json.loads(line))


class LineWriter:
    """Whole lines, from any thread."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def say(self, op: str, **fields: Any) -> None:
        line = json.dumps({"op": op, **fields}, ensure_ascii=False)
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()
