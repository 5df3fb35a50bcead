"""``python -m spider_worker.trackers.child``: the process of one tracker, started by
``process.py``.

It reads lines of JSON: a RunSpec with what to do first (``check`` or ``start``), then a step and
its metrics a line, then ``finish``. It answers in lines of JSON on what was its standard output;
whatever an SDK prints goes to standard error.
"""

from __future__ import annotations

__all__ = ["main"]

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from spider_sdk.errors import PipelineError, SpiderError
from spider_worker.trackers.base import Backend, RunSpec

Say = Callable[..., None]


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        return _serve(say)
    except SpiderError as error:
        say(error=type(error).__name__, message=error.message)
    except Exception as error:  # noqa: BLE001 - the boundary: an SDK raises what it likes
        say(error=PipelineError.__name__, message=f"{type(error).__name__}: {error}")
    return 1


def _serve(say: Say) -> int:
    first = json.loads(sys.stdin.readline())
    backend = _backend(RunSpec(**first["spec"]))
    if first["do"] == "check":
        backend.check()
        say(checked=True)
        return 0
    say(**dataclasses.asdict(backend.start()))
    for line in sys.stdin:
        message = json.loads(line)
        if "finish" in message:
            say(**dataclasses.asdict(backend.finish(message["finish"])))
            return 0
        backend.log(message["step"], message["metrics"])
    # Whoever trains is gone without a word. Another attempt may be about to go on with this very
    # run, so nothing more may be sent: what is missing there, it sends.
    return 1


def _backend(spec: RunSpec) -> Backend:
    if spec.kind == "wandb":
        from spider_worker.trackers.wandb import WandbBackend

        return WandbBackend(spec)
    from spider_worker.trackers.trackio import TrackioBackend

    return TrackioBackend(spec)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # an SDK's exit hooks wait for the network
