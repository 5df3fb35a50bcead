"""The one task: take a hint and supervise what it leads to."""

from __future__ import annotations

__all__ = ["work"]

import functools
import threading
from typing import Any

from celery.signals import worker_shutdown, worker_shutting_down

from spider_sdk.settings import load
from spider_worker.celery import app
from spider_worker.fleet import Fleet
from spider_worker.fleet.broker import HINT_TASK
from spider_worker.settings import FleetSettings, WorkerSettings
from spider_worker.supervisor import Supervisor

#: Raised by the signal handler, which may run while the supervisor is still being made.
_stopping = threading.Event()
_making = threading.Lock()


@functools.cache
def _made() -> Supervisor:
    return Supervisor(Fleet.connect(load(FleetSettings), app), load(WorkerSettings), _stopping)


def _supervisor() -> Supervisor:
    """The worker's one supervisor: a cache alone would make two for two first hints at once."""
    with _making:
        return _made()


@app.task(name=HINT_TASK)  # type: ignore[untyped-decorator]
def work(job_id: str) -> None:
    """Look at the job and work on it as long as it has units for us."""
    _supervisor().work(job_id)


@worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _stop(**_: Any) -> None:
    # Runs in a signal handler: it only raises a flag that the lanes see.
    _stopping.set()


@worker_shutdown.connect  # type: ignore[untyped-decorator]
def _close(**_: Any) -> None:
    # After the last task: no runner is left behind, not even an idle one.
    if _made.cache_info().currsize:
        _supervisor().close()
