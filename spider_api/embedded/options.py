"""What an embedded fleet is asked to be, and the environment that its programs get."""

from __future__ import annotations

__all__ = ["HOST", "FleetOptions", "child_environment", "demo_folder"]

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from spider_api.embedded.state import StateFolder

HOST = "127.0.0.1"

#: Variables of the person's own shell that would make a part of the fleet look elsewhere.
_NOT_INHERITED = ("SPIDER_API_KEY", "SPIDER_BASE_URL", "SPIDER_CONFIG", "SPIDER_SECRET_KEY")


@dataclasses.dataclass(frozen=True)
class FleetOptions:
    """``port`` 0 takes any free one. ``queues`` as after ``celery worker -Q``; ``workers`` is
    the number of worker processes. Jobs may name local models under ``data_roots``.
    ``sandbox`` is a value of SPIDER_SANDBOX. ``start_timeout`` is in seconds and bounds the
    start of each program."""

    state: Path
    port: int = 9000
    queues: str = "gpu"
    workers: int = 1
    data_roots: tuple[Path, ...] = ()
    sandbox: str = "auto"
    start_timeout: float = 180.0


def demo_folder() -> Path | None:
    """``config/demo`` of the checkout that this package runs from, None outside of one."""
    folder = Path(__file__).resolve().parents[2] / "config" / "demo"
    return folder if folder.is_dir() else None


def child_environment(
    options: FleetOptions, state: StateFolder, redis_url: str, inherited: Mapping[str, str]
) -> dict[str, str]:
    """``inherited`` with the SPIDER_* of this fleet on top."""
    env = {name: value for name, value in inherited.items() if name not in _NOT_INHERITED}
    return env | fleet_variables(options, state, redis_url, inherited)


def fleet_variables(
    options: FleetOptions, state: StateFolder, redis_url: str, inherited: Mapping[str, str]
) -> dict[str, str]:
    """The SPIDER_* that make a program part of this fleet."""
    given = [root for root in inherited.get("SPIDER_DATA_ROOTS", "").split(os.pathsep) if root]
    shipped = demo_folder()
    roots = [*given, *(str(root.resolve()) for root in options.data_roots)]
    roots += [str(shipped)] if shipped else []
    return {
        "SPIDER_REDIS_URL": redis_url,
        "SPIDER_ARTIFACTS": str(state.artifacts),
        "SPIDER_SECRET_KEY_FILE": str(state.secret_key),
        "SPIDER_STATE": str(state.worker),
        "SPIDER_ENV_CACHE": str(state.envs),
        "SPIDER_DATA_ROOTS": os.pathsep.join(dict.fromkeys(roots)),
        "SPIDER_ALLOW_PRIVATE_URLS": "true",  # a person's own vLLM is on localhost
        "SPIDER_SANDBOX": options.sandbox,
    }
