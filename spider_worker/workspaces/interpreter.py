"""The Python that commands of a box find first, and what of the host it needs to see."""

from __future__ import annotations

__all__ = ["interpreter_roots"]

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Final

from spider_sdk.errors import EngineUnavailable

_SECONDS: Final = 20.0
_QUESTION: Final = "import json, sys; print(json.dumps([sys.prefix, sys.base_prefix]))"


@functools.cache
def interpreter_roots(executable: str) -> tuple[str, ...]:
    """Folders and links without which ``executable`` does not run. Blocking: asks it.

    Raises EngineUnavailable where it does not run.
    """
    try:
        answer = subprocess.run(  # noqa: S603
            [executable, "-I", "-c", _QUESTION],
            capture_output=True, check=True, env={}, timeout=_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineUnavailable(f"the interpreter {executable} does not run: {error}") from error
    prefixes = [str(prefix) for prefix in json.loads(answer.stdout) if prefix != "/"]
    roots = dict.fromkeys(prefixes)
    link = Path(executable)
    # A virtual environment's python is a chain of links, and all of them have to be there.
    for _ in range(20):
        if not any(link.is_relative_to(root) for root in roots):
            roots[str(link)] = None
        if not link.is_symlink():
            break
        link = link.parent / link.readlink()
    roots.update(dict.fromkeys(os.path.realpath(prefix) for prefix in prefixes))
    return tuple(roots)
