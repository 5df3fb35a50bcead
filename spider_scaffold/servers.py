"""Where a job runs: on the server that somebody named, or on a fleet of its own."""

from __future__ import annotations

__all__ = ["Place", "at", "named_server"]

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from spider_scaffold.jobfile import FOLDER
from spider_sdk import settings
from spider_sdk.cli.state import State
from spider_sdk.client import Client
from spider_sdk.config import AppConfig
from spider_sdk.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Place:
    """``server`` is None for a fleet in the tree, whose own files are in ``fleet``."""

    client: Client
    server: str | None
    fleet: Path | None = None


def named_server(config: AppConfig, *, local: bool, server: str | None) -> str | None:
    """The API's address by flag, file, environment or user config; None where none names one, or
    ``local`` asks for none."""
    if local:
        if server is not None:
            raise UsageError("--local needs no server: give --local or --server, not both")
        return None
    given = server or config.server.base_url
    if given:
        return given
    (address, *_) = [
        line for line in settings.origins(settings.ClientSettings)
        if line.variable == "SPIDER_BASE_URL"
    ]  # fmt: skip
    if address.origin == "default":
        return None
    return settings.load(settings.ClientSettings).base_url


@contextlib.contextmanager
def at(state: State, config: AppConfig, server: str | None, tree: Path) -> Iterator[Place]:
    """A client of the server, or of a fleet that runs as long as the context and keeps what it
    has in the tree. Raises what either cannot do."""
    if server is not None:
        with Client(config, base_url=server) as client:
            yield Place(client, client.base_url)
        return
    # Here, not above: Celery and redis take half a second that a job on a server can do without.
    from spider_api.commands.reporting import Reporter
    from spider_api.embedded import EmbeddedFleet, FleetOptions

    folder = tree / FOLDER / "fleet"
    # A SWE job has no function of its user's, for which a sandbox would have to be found.
    options = FleetOptions(state=folder, port=0, queues="swe-agent", sandbox="auto")
    with (
        EmbeddedFleet(options, Reporter(state).status) as fleet,
        Client(config, base_url=fleet.base_url, api_key=fleet.api_key) as client,
    ):
        yield Place(client, None, folder)
