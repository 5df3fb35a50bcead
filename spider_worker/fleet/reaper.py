"""The reaper: expired leases go back, forgotten jobs are hinted at again.

It runs in any API process, in as many as there are: each sweep is one script.
"""

from __future__ import annotations

__all__ = ["Reaper"]

import logging
import threading

from spider_sdk.errors import FleetUnavailable
from spider_worker.fleet.broker import Hints
from spider_worker.fleet.connection import Scripts
from spider_worker.fleet.units import BACKOFF_CAP
from spider_worker.settings import FleetSettings

logger = logging.getLogger(__name__)

#: Expired leases and forgotten jobs handled in one script, so that no sweep blocks Redis long.
BATCH = 200
#: Shortest pause between sweeps, in seconds.
MIN_PAUSE = 0.1


class Reaper:
    def __init__(self, scripts: Scripts, hints: Hints, settings: FleetSettings) -> None:
        self._scripts = scripts
        self._hints = hints
        self._settings = settings

    def sweep(self) -> float:
        """One sweep; returns the seconds until the next is worth while."""
        settings = self._settings
        answer = self._scripts.run(
            "reap",
            settings.max_attempts,
            int(settings.backoff * 1000),
            int(BACKOFF_CAP * 1000),
            int(settings.hint_after * 1000),
            BATCH,
        )
        for job_id, queue in zip(answer[1::2], answer[2::2], strict=True):
            self._hints.publish(job_id.decode(), queue.decode())
        pause = settings.reaper_interval
        if answer[0] >= 0:
            pause = min(pause, answer[0] / 1000)
        return max(pause, MIN_PAUSE)

    def run(self, stop: threading.Event) -> None:
        """Sweep until ``stop`` is set. An unreachable Redis is waited for."""
        pause = 0.0
        while not stop.wait(pause):
            try:
                pause = self.sweep()
            except FleetUnavailable as error:
                logger.warning("the reaper waits for Redis: %s", error)
                pause = self._settings.reaper_interval
            except Exception:  # boundary: without a reaper no job of the fleet would recover
                logger.exception("a sweep of the reaper failed; the next one tries again")
                pause = self._settings.reaper_interval
