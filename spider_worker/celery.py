"""The Celery app: ``celery -A spider_worker worker -Q gpu`` finds it here."""

from __future__ import annotations

__all__ = ["app"]

from spider_sdk.settings import load
from spider_worker.fleet.broker import make_app
from spider_worker.settings import FleetSettings

app = make_app(load(FleetSettings))
app.conf.include = ["spider_worker.tasks"]
