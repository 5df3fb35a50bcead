"""A runner that dies at the N-th script, rename, write or fsync: fault 10, from outside.

``python -m tests.support.crashing_runner --control … --report …`` in place of
``spider_worker.runner``. ``CRASH_AT`` is the number of the point (each operation has one before
and one after it), ``CRASH_FILE`` a file that is made when the crash happens, so that the next
runner lives. Without a crash the number of points passed is written to ``CRASH_COUNT``.
"""

from __future__ import annotations

import atexit
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spider_worker.fleet.connection import Scripts

_lock = threading.Lock()
_passed = 0


def _point(name: str) -> None:
    global _passed
    crash = Path(os.environ["CRASH_FILE"])
    with _lock:
        _passed += 1
        if _passed == int(os.environ.get("CRASH_AT", "0")) and not crash.exists():
            crash.write_text(name)
            os.killpg(os.getpgid(0), signal.SIGKILL)


def _around(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        _point(f"before {name}")
        answer = function(*args, **kwargs)
        _point(f"after {name}")
        return answer

    return wrapped


def _install() -> None:
    run = Scripts.run

    def counted(self: Scripts, name: str, *args: Any) -> Any:
        # Progress is timed by the clock, which would make the points differ between runs.
        return (
            run(self, name, *args) if name == "progress" else _around(run, name)(self, name, *args)
        )

    Scripts.run = counted  # type: ignore[method-assign]
    os.fsync = _around(os.fsync, "fsync")
    os.replace = _around(os.replace, "replace")
    Path.replace = _around(Path.replace, "rename")  # type: ignore[method-assign]


def _write_count() -> None:
    if count := os.environ.get("CRASH_COUNT"):
        Path(count).write_text(str(_passed))


if __name__ == "__main__":
    from spider_worker.runner.__main__ import main

    _install()
    atexit.register(_write_count)
    sys.exit(main())
