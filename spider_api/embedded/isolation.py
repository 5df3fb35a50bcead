"""Which isolation of user functions this machine can give, asked by trying it."""

from __future__ import annotations

__all__ = ["choose_sandbox"]

import subprocess
import sys
from collections.abc import Mapping

#: What a worker does before it runs a user function. It is asked in a process of its own, as the
#: worker is one: the API's side imports nothing of the sandbox.
_PROBE = """
import sys
from spider_sdk.errors import NotSupported
from spider_worker.sandbox.isolation import choose_launcher, inspect_interpreter
try:
    choose_launcher("auto", inspect_interpreter(sys.executable))
except NotSupported as error:
    sys.exit(str(error))
"""
_SECONDS = 60.0


def choose_sandbox(env: Mapping[str, str]) -> tuple[str, str | None]:
    """``(SPIDER_SANDBOX, warning)``: what the operator set, else ``auto`` where a worker with
    the environment ``env`` can isolate user functions, else ``process`` and a warning to print.

    A worker of a real fleet refuses user functions where it cannot isolate them. The embedded
    fleet runs the functions of the one person who started it, so it says so and goes on.
    """
    if env.get("SPIDER_SANDBOX"):
        return env["SPIDER_SANDBOX"], None
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", _PROBE],
        env=dict(env),
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode == 0:
        return "auto", None
    reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
    return "process", (
        "going on with SPIDER_SANDBOX=process: processors can read your files and use the "
        f"network. {reason[0]}"
    )
