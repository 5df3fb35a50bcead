"""What one run of ``spider`` shares: how to speak, and which exit code an error has.

Results go to stdout, everything said about them to stderr. With ``--json`` stdout carries JSON
alone, one document a line, errors included.
"""

from __future__ import annotations

__all__ = ["EXIT", "Detached", "State", "exit_code", "json_option"]

import json
import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from spider_sdk.errors import (
    ApiError,
    ConfigError,
    FleetUnavailable,
    JobCancelled,
    JobFailed,
    ServerBusy,
    ServerUnreachable,
    SpiderError,
)

F = TypeVar("F", bound=Callable[..., Any])

EXIT = {"done": 0, "failed": 1, "usage": 2, "unreachable": 3, "cancelled": 4, "interrupted": 130}


class Detached(SpiderError):
    """Ctrl-C while following: the job goes on."""


def exit_code(error: SpiderError) -> int:
    """The exit code that an error stands for."""
    if isinstance(error, Detached):
        return EXIT["interrupted"]
    if isinstance(error, JobCancelled):
        return EXIT["cancelled"]
    if isinstance(error, JobFailed):
        return EXIT["failed"]
    unreachable = isinstance(error, (ServerUnreachable, ServerBusy, FleetUnavailable))
    if unreachable or (isinstance(error, ApiError) and (error.status >= 500 or not error.status)):
        return EXIT["unreachable"]
    return EXIT["usage"]


class State:
    """``json`` is set by a command's ``--json``."""

    def __init__(self) -> None:
        self.json = False
        handler = logging.StreamHandler(_Stderr())
        handler.setFormatter(logging.Formatter("%(message)s"))
        log = logging.getLogger("spider_sdk")
        log.handlers[:] = [handler]
        log.setLevel(logging.INFO)

    def emit(self, document: Any) -> None:
        """One JSON document, on a line of its own."""
        click.echo(json.dumps(document, ensure_ascii=False, default=str))

    def say(self, text: str) -> None:
        """For people, on stdout; nothing with ``--json``."""
        if not self.json:
            click.echo(text)

    def note(self, text: str) -> None:
        """For people, on stderr."""
        click.echo(text, err=True)

    def fail(self, error: SpiderError) -> int:
        """Say what went wrong and return the exit code."""
        code = exit_code(error)
        if self.json:
            document: dict[str, Any] = {"type": type(error).__name__, "message": error.message}
            if isinstance(error, ConfigError):
                document["errors"] = [
                    {"file": p.file, "line": p.line, "path": p.path, "message": p.message}
                    for p in error.problems
                ]
            self.emit({"error": document, "exit_code": code})
            return code
        prefix = "" if isinstance(error, (ConfigError, Detached)) else "error: "
        self.note(prefix + error.message)
        if isinstance(error, ConfigError) and len(error.problems) > 1:
            self.note(f"{len(error.problems)} problems")
        return code

    def usage(self, error: click.ClickException) -> int:
        if self.json:
            document = {"type": "UsageError", "message": error.format_message()}
            self.emit({"error": document, "exit_code": EXIT["usage"]})
        else:
            error.show()
        return EXIT["usage"]


class _Stderr:
    """Whatever ``sys.stderr`` is at the time of writing, so that tests can capture it."""

    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def json_option(command: F) -> F:
    """``--json``, which also turns error messages into JSON."""

    def note(ctx: click.Context, _param: click.Parameter, value: bool) -> bool:
        ctx.ensure_object(State).json = value
        return value

    return click.option(
        "--json",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=note,
        help="Print JSON, one document a line.",
    )(command)
