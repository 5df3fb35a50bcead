"""``python -m spider_agent``: one episode on standard input and output."""

from __future__ import annotations

__all__ = ["main"]

import os
import sys

from spider_agent.lines import LineWriter, read_request


def main() -> None:
    # What the SDK and what it starts print must not stand among the lines.
    out = LineWriter(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    request = read_request(sys.stdin)
    from spider_agent.episode import run_episode

    run_episode(request, out)


if __name__ == "__main__":
    main()
