"""Which commit of Spider is at work, where that is known."""

from __future__ import annotations

__all__ = ["spider_commit"]

import functools
import importlib.metadata
import json
import subprocess
from pathlib import Path

import spider_worker


@functools.cache
def spider_commit() -> str | None:
    """The commit that this package was installed from or is checked out at; None where it came as
    a plain package."""
    try:
        origin = importlib.metadata.distribution("spider-distill").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        origin = None
    installed = json.loads(origin or "{}").get("vcs_info", {}).get("commit_id")
    return str(installed) if installed else _checked_out(Path(spider_worker.__file__).parents[1])


def _checked_out(folder: Path) -> str | None:
    """``HEAD`` of the repository whose root ``folder`` is; None where it is none, or git is not
    to be had."""
    if not (folder / ".git").exists():
        return None  # another repository may be around it, say one with an environment in it
    command = ["git", "-c", "safe.directory=*", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(  # noqa: S603 (no shell; the arguments are ours)
            command, capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
