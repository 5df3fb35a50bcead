"""The embedded fleet: everything that a laptop needs, in one process tree and one folder."""

from __future__ import annotations

__all__ = [
    "EmbeddedFleet",
    "FleetOptions",
    "StateFolder",
    "choose_sandbox",
    "demo_folder",
    "port_or_any",
]

from spider_api.embedded.fleet import EmbeddedFleet
from spider_api.embedded.isolation import choose_sandbox
from spider_api.embedded.options import FleetOptions, demo_folder
from spider_api.embedded.ports import port_or_any
from spider_api.embedded.state import StateFolder
