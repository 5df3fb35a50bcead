"""The fleet: the one place that knows Redis, and the truth about every job.

``Fleet.connect(settings)`` gives the whole; the modules are one noun each.
"""

from __future__ import annotations

__all__ = [
    "ArtifactEntry",
    "ArtifactStore",
    "Caps",
    "Claim",
    "EventLog",
    "EventPage",
    "Fleet",
    "InputStore",
    "JobRecord",
    "JobStore",
    "NoUnit",
    "Reaper",
    "Results",
    "SecretBox",
]

from spider_worker.fleet.artifacts import ArtifactEntry, ArtifactStore, InputStore
from spider_worker.fleet.caps import Caps
from spider_worker.fleet.events import EventLog, EventPage
from spider_worker.fleet.fleet import Fleet
from spider_worker.fleet.jobs import JobRecord, JobStore
from spider_worker.fleet.reaper import Reaper
from spider_worker.fleet.results import Results
from spider_worker.fleet.secret_box import SecretBox
from spider_worker.fleet.units import Claim, NoUnit
