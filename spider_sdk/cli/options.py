"""Options that several commands share, and what they build."""

from __future__ import annotations

__all__ = [
    "connect",
    "env_option",
    "load_config",
    "pass_state",
    "server_options",
    "set_option",
]

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from spider_sdk.cli.state import State

if TYPE_CHECKING:
    from spider_sdk.client import Client
    from spider_sdk.config import AppConfig

F = TypeVar("F", bound=Callable[..., Any])

pass_state = click.make_pass_decorator(State, ensure=True)

env_option = click.option(
    "--env",
    "env",
    multiple=True,
    metavar="NAME",
    help="Forward this environment variable to the job (repeatable).",
)

set_option = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="PATH=VALUE",
    help="Replace a value of the config, e.g. job.generation.parameters.temperature=0.2, or "
    "temperature=0.2 in the config of a SWE job.",
)


def load_config(path: Path, sets: Sequence[str] = ()) -> AppConfig:
    """The config at ``path`` with ``--set`` applied."""
    from spider_sdk.config import AppConfig, parse_override

    return AppConfig.load(path, dict(parse_override(text) for text in sets))


def server_options(command: F) -> F:
    """``--base-url`` and ``--config`` for commands that talk to a server."""
    command = click.option(
        "-c",
        "--config",
        "config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Take the server section of this config.",
    )(command)
    return click.option(
        "--base-url", metavar="URL", help="Where the API is (default: SPIDER_BASE_URL)."
    )(command)


def connect(config: AppConfig | Path | None, base_url: str | None, **options: Any) -> Client:
    """A client for a command; use it as a context manager."""
    # Here, not above: what needs no server should not wait for an HTTP client.
    from spider_sdk.client import Client

    return Client(config, base_url=base_url, **options)
