"""Git of this host, run so that no repository, user or system has a say in what it does."""

from __future__ import annotations

__all__ = ["ENVIRONMENT", "OPTIONS", "run_git"]

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from spider_sdk.errors import WorkspaceError
from spider_worker.workspaces.base import Finished
from spider_worker.workspaces.process import OUTPUT_BYTES, run_command

#: No configuration but a repository's own, no question on a terminal; one author and one date, so
#: that the same tree is the same commit everywhere.
ENVIRONMENT: Final[Mapping[str, str]] = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_AUTHOR_NAME": "spider",
    "GIT_AUTHOR_EMAIL": "spider@localhost",
    "GIT_AUTHOR_DATE": "2000-01-01T00:00:00+0000",
    "GIT_COMMITTER_NAME": "spider",
    "GIT_COMMITTER_EMAIL": "spider@localhost",
    "GIT_COMMITTER_DATE": "2000-01-01T00:00:00+0000",
}

#: Hooks, monitors and the like stay off, bytes stay as they are, and any owner of a tree will do.
OPTIONS: Final = (
    "-c", "safe.directory=*",
    "-c", "core.hooksPath=/dev/null",
    "-c", "core.fsmonitor=false",
    "-c", "core.autocrlf=false",
    "-c", "core.safecrlf=false",
    "-c", "core.quotePath=true",
    "-c", "core.attributesFile=/dev/null",
    "-c", "core.excludesFile=/dev/null",
    "-c", "commit.gpgSign=false",
    "-c", "gc.auto=0",
    "-c", "maintenance.auto=false",
    "-c", "advice.detachedHead=false",
    "-c", "protocol.file.allow=always",
    "-c", "protocol.ext.allow=never",
    "-c", "init.defaultBranch=main",
)  # fmt: skip


async def run_git(
    *arguments: str,
    cwd: Path,
    timeout: float = 600.0,  # noqa: ASYNC109
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    output_bytes: int = OUTPUT_BYTES,
    options: Sequence[str] = (),
) -> Finished:
    """Run git on this host; ``options`` go before the command. Raises WorkspaceError where it
    fails or takes more than ``timeout`` seconds, with the end of what it said."""
    whole = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": "/nonexistent",
        "LANG": "C.UTF-8",
        **ENVIRONMENT,
        **(env or {}),
    }
    command: Sequence[str] = ("git", *OPTIONS, *options, *arguments)
    done = await run_command(
        command, timeout=timeout, stdin=stdin, env=whole, cwd=cwd, output_bytes=output_bytes
    )
    if not done.ok:
        how = f"did not end within {timeout:g} s" if done.code is None else f"ended {done.code}"
        said = done.text.strip()[-2000:]
        raise WorkspaceError(f"git {arguments[0]} {how}: {said}")
    return done
