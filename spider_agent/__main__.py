"""``python -m spider_agent [SOCKET]``: one episode on standard input and output.

With a socket, a worker's proxy on it is what the model is reached by.
"""

from __future__ import annotations

__all__ = ["main"]

import os
import sys

from spider_agent.confine import close_memory
from spider_agent.forward import forward
from spider_agent.lines import LineWriter, read_request


def main() -> None:
    close_memory()
    # What the SDK and what it starts print must not stand among the lines.
    out = LineWriter(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    request = read_request(sys.stdin)
    if len(sys.argv) > 1:
        request.llm["base_url"] = f"http://127.0.0.1:{forward(sys.argv[1])}/v1"
    from spider_agent.episode import run_episode

    run_episode(request, out)


if __name__ == "__main__":
    main()
