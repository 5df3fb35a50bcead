"""Start a program that dies with its parent: ``tether.py SIGNAL PARENT PROGRAM ARGS…``.

A fleet whose ``spider up`` was killed with SIGKILL must not leave a Redis, an API and a worker
behind. Linux sends a chosen signal to a process whose parent thread dies (PR_SET_PDEATHSIG),
and the setting survives ``execve``; it has to be made in the child, and a program of its own is
the way to do that without running Python between fork and exec in a process with threads. Where
there is no prctl (macOS) the program is started all the same, and only a kill -9 of ``spider
up`` leaves it behind.
"""

from __future__ import annotations

__all__ = ["command", "main"]

import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def command(on_death: signal.Signals, arguments: Sequence[str]) -> list[str]:
    """The command line that starts ``arguments`` tethered to the calling process.

    ``on_death`` is what the program gets when the thread that starts it ends, so start it
    from a thread that lives as long as the fleet does (the main thread).
    """
    parent = str(os.getpid())
    return [sys.executable, "-I", "-S", __file__, str(int(on_death)), parent, *arguments]


def main(argv: Sequence[str]) -> None:
    number, parent, program, *rest = argv
    if sys.platform.startswith("linux"):
        import ctypes

        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != int(parent):  # it died before the tether was tied
            raise SystemExit(0)
    os.execvp(program, [program, *rest])  # noqa: S606  (no shell is the point)


if __name__ == "__main__":
    main(sys.argv[1:])
