"""How ``up`` and ``demo`` say what they do: a line with the seconds so far, or JSON."""

from __future__ import annotations

__all__ = ["Reporter"]

import time
from typing import Any

import click

from spider_sdk.cli.state import State


class Reporter:
    """``part`` names who a line is about (``redis``, ``api``, ``worker-1``, ``demo``)."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._started = time.monotonic()

    def status(self, part: str, text: str) -> None:
        seconds = time.monotonic() - self._started
        self._state.say(f"{seconds:6.1f} s  {click.style(f'{part:<9}', bold=True)} {text}")
        self.document("status", part=part, message=text)

    def warning(self, text: str) -> None:
        self.document("warning", message=text)
        if not self._state.json:
            self._state.note(f"warning: {text}")

    def document(self, event: str, **values: Any) -> None:
        """With ``--json`` only: what ``status`` and the text for people say."""
        if self._state.json:
            self._state.emit({"event": event, **values})
