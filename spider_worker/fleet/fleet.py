"""The fleet in one object: everything that API, supervisor and runner need of it."""

from __future__ import annotations

__all__ = ["Fleet"]

import dataclasses
import functools
import logging

from celery import Celery

from spider_sdk.errors import FleetUnavailable
from spider_worker.fleet.artifacts import ArtifactStore, InputStore
from spider_worker.fleet.broker import Hints, make_app
from spider_worker.fleet.connection import Client, Scripts, connect, fleet_errors
from spider_worker.fleet.events import EventLog
from spider_worker.fleet.jobs import JobRecord, JobStore
from spider_worker.fleet.reaper import Reaper
from spider_worker.fleet.results import Results
from spider_worker.fleet.secret_box import SecretBox
from spider_worker.fleet.units import UnitStore
from spider_worker.settings import FleetSettings

logger = logging.getLogger(__name__)


class Fleet:
    """Connects on first use; safe to share between threads."""

    def __init__(self, settings: FleetSettings, client: Client, app: Celery) -> None:
        self.settings = settings
        self.redis = client
        self.scripts = Scripts(client)
        self.hints = Hints(app)
        self.events = EventLog(client, self.scripts)
        self.units = UnitStore(client, self.scripts, settings)
        self.artifacts = ArtifactStore(client, settings.artifacts.absolute())
        self.inputs = InputStore(settings.artifacts.absolute())
        self.results = Results(self.artifacts)
        self.reaper = Reaper(self.scripts, self.hints, settings)
        self.jobs = JobStore(
            client,
            self.scripts,
            lambda: self.secret_box,
            settings,
            self.hints.publish,
            self._mirror,
        )

    @classmethod
    def connect(cls, settings: FleetSettings, app: Celery | None = None) -> Fleet:
        return cls(settings, connect(settings.redis_url), app or make_app(settings))

    @functools.cached_property
    def secret_box(self) -> SecretBox:
        """Read when first needed: a runner never needs the key, and is not given it."""
        return SecretBox.from_settings(self.settings)

    def ping(self) -> None:
        """Raises FleetUnavailable."""
        with fleet_errors():
            if not self.redis.ping():
                raise FleetUnavailable

    def close(self) -> None:
        self.redis.close()

    def _mirror(self, record: JobRecord) -> None:
        try:
            self.artifacts.write_job(record.job_id, dataclasses.asdict(record))
        except OSError as error:
            # The job is accepted and durable in Redis; its copy is for a day when that is lost.
            logger.error("no copy of job %s beside its artifacts: %s", record.job_id, error)
