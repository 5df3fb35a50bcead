"""What agents are doing: who is at work, and what the following of a job sets off."""

from __future__ import annotations

__all__ = ["Board"]

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from spider_scaffold.mirror import Mirror
from spider_sdk.events import Event
from spider_sdk.jobs import StatusDocument

_MOST: Final = 8  #: instances that are shown one by one
_FILED: Final = "unit.committed"  #: what an instance left is in the manifest


@dataclasses.dataclass
class _Run:
    """``began`` None: before the job was followed from here."""

    began: float | None
    attempt: int = 1
    turns: int | None = None
    cost: float | None = None
    judging: bool = False


class Board:
    """A watcher of one job: keeps its mirror up to date, and shows the instances at work."""

    def __init__(self, mirror: Mirror, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._mirror = mirror
        self._clock = clock
        self._running: dict[tuple[str, int], _Run] = {}
        self._ended: set[tuple[str, int]] = set()

    def update(self, document: StatusDocument, event: Event | None) -> None:
        if event is None or event.code == _FILED:
            self._mirror.changed()
        if event is not None:
            self._note(event)
        if document["status"] != "running":
            self._running.clear()
        self._mirror.catch_up()

    def rest(self) -> None:
        self._mirror.catch_up()

    def lines(self) -> list[str]:
        """One line an instance at work; of many, the first ones."""
        runs = list(self._running.items())
        lines = [self._line(key, run) for key, run in runs[:_MOST]]
        if len(runs) > _MOST:
            lines.append(f"  and {len(runs) - _MOST} more")
        return lines

    def _note(self, event: Event) -> None:
        key = str(event.data.get("instance")), int(event.data.get("n") or 0)
        if event.code == "instance.started":
            self._running[key] = _Run(self._clock())
            self._ended.discard(key)
        elif event.code == "instance.judging":
            self._running.setdefault(key, _Run(None)).judging = True
        elif event.code == "instance.ended":
            self._running.pop(key, None)
            self._ended.add(key)
        elif event.code == "progress" and isinstance(event.data.get("engine"), Mapping):
            self._progress(event.data["engine"])

    def _progress(self, said: Mapping[str, Any]) -> None:
        """Events of progress are of one instance each, and few: a place that is not told of was
        not left."""
        if said.get("instance") is None:
            return
        key = str(said["instance"]), int(said.get("n") or 0)
        if key in self._ended:  # a progress that was held back
            return
        run = self._running.setdefault(key, _Run(None))
        run.attempt = int(said.get("attempt") or run.attempt)
        run.turns = said.get("turns", run.turns)
        run.cost = said.get("cost", run.cost)

    def _line(self, key: tuple[str, int], run: _Run) -> str:
        instance, n = key
        words = [instance + (f" (run {n})" if n else "")]
        if run.attempt > 1:
            words.append(f"attempt {run.attempt}")
        if run.turns is not None:
            words.append(f"turn {run.turns}")
        if run.cost is not None:
            words.append(f"${run.cost:.2f}")
        if run.judging:
            words.append("its tests run")
        if run.began is not None:
            seconds = int(self._clock() - run.began)
            words.append(f"{seconds // 60}m {seconds % 60:02d}s")
        return "  " + " · ".join(words)
