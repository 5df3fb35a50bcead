"""The Python that commands of a box find first, and what of the host it needs to see."""

from __future__ import annotations

__all__ = ["interpreter_roots"]

import subprocess

from spider_sdk.errors import EngineUnavailable
from spider_worker import confinement


def interpreter_roots(executable: str) -> tuple[str, ...]:
    """Folders and links without which ``executable`` does not run. Blocking: asks it.

    Raises EngineUnavailable where it does not run.
    """
    try:
        return confinement.interpreter_roots(executable)
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineUnavailable(f"the interpreter {executable} does not run: {error}") from error
