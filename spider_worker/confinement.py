"""What every way of shutting a process in has to know of this host: a leaf, for the sandbox of user
functions and for the boxes of agents alike."""

from __future__ import annotations

__all__ = ["KERNEL_PATHS", "disables_userns", "interpreter_roots"]

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Final

_SECONDS: Final = 20.0
_QUESTION: Final = "import json, sys; print(json.dumps([sys.prefix, sys.base_prefix]))"

#: The kernel lets root's own user write to these without any capability, and the worker may be
#: root: ``core_pattern`` alone would be a way out.
KERNEL_PATHS: Final = (
    "/proc/sys", "/proc/fs", "/proc/scsi", "/proc/acpi", "/proc/mtrr", "/proc/sysrq-trigger",
)  # fmt: skip


@functools.cache
def interpreter_roots(executable: str) -> tuple[str, ...]:
    """Folders and links without which ``executable`` does not run. Blocking: asks it.

    Raises OSError and subprocess.SubprocessError where it does not run.
    """
    answer = subprocess.run(  # noqa: S603
        [executable, "-I", "-c", _QUESTION],
        capture_output=True, check=True, env={}, timeout=_SECONDS,
    )  # fmt: skip
    prefixes = [str(prefix) for prefix in json.loads(answer.stdout) if prefix != "/"]
    roots = dict.fromkeys(prefixes)
    # A virtual environment's python is a chain of links; each of them has to be there.
    link = Path(executable)
    for _ in range(20):
        if not any(link.is_relative_to(root) for root in roots):
            roots[str(link)] = None
        if not link.is_symlink():
            break
        link = link.parent / link.readlink()
    # The prefix may itself be reached over a link (…/cpython-3.12 -> …/cpython-3.12.4).
    roots.update(dict.fromkeys(os.path.realpath(prefix) for prefix in prefixes))
    return tuple(roots)


@functools.cache
def disables_userns(bwrap: str) -> bool:
    """Whether this bubblewrap can forbid further user namespaces (from 0.8 on), in which a process
    would have capabilities again."""
    try:
        said = subprocess.run([bwrap, "--help"], capture_output=True, timeout=_SECONDS)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return False
    return b"--disable-userns" in said.stdout + said.stderr
