"""Jobs again after Redis lost them: from what lies beside their artifacts.

A job that had come to its end is as it was. Any other one is failed with the reason
``redis_lost``: its secrets are gone with Redis, so that it goes on by a retry, which brings them
anew, plans again and runs what is missing. What was in flight is lost with its journals' entries.
API keys are not rebuilt.
"""

from __future__ import annotations

__all__ = ["rebuild"]

import json
import logging
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from spider_worker.fleet.caps import Caps, argument
from spider_worker.fleet.fleet import Fleet

logger = logging.getLogger(__name__)

MESSAGE = "the fleet's Redis was lost; a retry runs what is missing"


def rebuild(fleet: Fleet) -> list[str]:
    """Put back every job that is on disk and not in Redis; returns their ids.

    Safe to run twice and beside a running fleet. Raises FleetUnavailable.
    """
    jobs = fleet.artifacts.root / "jobs"
    found = ((path.parent, _read(path)) for path in sorted(jobs.glob("*/job.json")))
    return [
        str(record["job_id"]) for folder, record in found if record and _put(fleet, folder, record)
    ]


def _put(fleet: Fleet, folder: Path, record: Mapping[str, Any]) -> bool:
    commits = _latest(filter(None, map(_read, sorted((folder / "manifest").glob("*.json")))))
    work = [commit for commit in commits.values() if commit["kind"] == "work"]
    end = commits.get("finalise")
    rows = commits.get("plan", {}).get("rows_total")
    units: list[str | int] = []
    for commit in work:
        units += [commit["unit"], commit["number"], json.dumps(commit["spec"]), commit["fence"]]
        units += [json.dumps(commit["counters"]), "done" if commit["complete"] else "stopped"]
    entries = [entry for commit in commits.values() for entry in commit["entries"]]
    manifest = [text for entry in entries for text in (entry["name"], json.dumps(entry))]
    document = record["document"]
    caps = Caps.of(document)
    submitted = datetime.fromisoformat(record["submitted_at"]).timestamp()
    answer = fleet.scripts.run(
        "restore",
        record["job_id"],
        record["owner"],
        record["queue"],
        json.dumps(document, sort_keys=True, separators=(",", ":")),
        round(submitted * 1000),
        argument(caps.max_runners),
        argument(caps.max_live),
        argument(caps.budget),
        argument(caps.reserve),
        fleet.settings.event_history,
        (end or {}).get("remote") or "",
        1 if end else 0,
        "completed" if end else MESSAGE,
        "" if rows is None else rows,
        len(work),
        *units,
        *manifest,
    )
    return bool(answer)


def _latest(commits: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Of each unit the commit with the highest fence; a retry makes another. The end of a job
    counts only if nothing was committed after it."""
    latest: dict[str, Mapping[str, Any]] = {}
    for commit in commits:
        known = latest.get(commit["unit"])
        if known is None or known["fence"] < commit["fence"]:
            latest[commit["unit"]] = commit
    end = latest.get("finalise")
    if end and any(commit["at"] > end["at"] for commit in latest.values()):
        del latest["finalise"]
    return latest


def _read(path: Path) -> dict[str, Any] | None:
    try:
        document: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        logger.warning("%s is passed over: %s", path, error)
        return None
    return document
