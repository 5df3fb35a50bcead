"""What a request handler works with, kept on the Flask app."""

from __future__ import annotations

__all__ = ["Api", "current", "of"]

import dataclasses
import threading

from flask import Flask, current_app

from spider_api.metrics import Metrics
from spider_api.policy import Policy
from spider_api.settings import ApiSettings
from spider_worker.fleet import Fleet
from spider_worker.fleet.keys import ApiKeys
from spider_worker.fleet.live import LiveReader

EXTENSION = "spider"


@dataclasses.dataclass
class Api:
    """One API process. Shared by all its requests."""

    settings: ApiSettings
    fleet: Fleet
    keys: ApiKeys
    live: LiveReader
    policy: Policy
    metrics: Metrics
    _stop: threading.Event = dataclasses.field(default_factory=threading.Event)

    def install(self, app: Flask) -> None:
        app.extensions[EXTENSION] = self

    def start_reaper(self) -> None:
        """In a thread (a greenlet under gevent) until ``close``."""
        threading.Thread(
            target=self.fleet.reaper.run, args=(self._stop,), name="reaper", daemon=True
        ).start()

    def close(self) -> None:
        """Stop the reaper and end every stream; clients come back to another process."""
        self._stop.set()
        self.live.close()


def of(app: Flask) -> Api:
    """The API that ``app`` serves."""
    api = app.extensions[EXTENSION]
    assert isinstance(api, Api)
    return api


def current() -> Api:
    """The API of the app that serves this request."""
    return of(current_app)
