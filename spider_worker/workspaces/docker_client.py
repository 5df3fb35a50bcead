"""The docker command line: what is asked of an engine, and what its failures mean."""

from __future__ import annotations

__all__ = ["docker", "docker_environment"]

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from spider_sdk.errors import WorkspaceError
from spider_worker.workspaces.base import Finished
from spider_worker.workspaces.process import run_command

#: What the client itself reads: where the engine is and how to log in there.
_VARIABLES: Final = (
    "PATH", "HOME", "DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG", "DOCKER_TLS_VERIFY",
    "DOCKER_CERT_PATH", "XDG_RUNTIME_DIR", "SSH_AUTH_SOCK",
)  # fmt: skip


def docker_environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


async def docker(
    *arguments: str,
    timeout: float = 120.0,  # noqa: ASYNC109 - it kills, cancelling waits
    stdin: bytes = b"",
    stdout: Path | None = None,
    what: str | None = None,
) -> Finished:
    """Run ``docker`` with ``arguments``. With ``what``, the words for what was tried, a failure
    is an error; without, the caller looks at the status.

    Raises WorkspaceError where docker cannot be started, or for a failure.
    """
    command: Sequence[str] = ("docker", *arguments)
    done = await run_command(
        command, timeout=timeout, stdin=stdin, env=docker_environment(), stdout=stdout
    )
    if what is not None and not done.ok:
        said = done.text.strip()[-2000:] or f"docker ended with {done.code}"
        if done.code is None:
            said = f"docker did not end within {timeout:g} s"
        raise WorkspaceError(f"{what}: {said}")
    return done
