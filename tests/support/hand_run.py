"""A job taken through its life by hand: the fleet's own transitions, without worker or engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spider_worker.fleet import Claim, Fleet

KINDS = ("plan", "work", "publish", "finalise")


def record(index: int, **extra: Any) -> dict[str, Any]:
    """A finished record, ``id`` first as the worker writes it."""
    return {
        "id": f"{index}-0",
        "index": index,
        "sample": 0,
        "prompt": f"q{index}",
        "completion": f"a{index} é\u2028",
        "error": None,
        **extra,
    }


class HandRun:
    """Plays the worker of one job."""

    def __init__(self, fleet: Fleet, job_id: str, units: int = 2) -> None:
        self.fleet = fleet
        self.job_id = job_id
        specs = [[f"u{number}", number, "{}"] for number in range(units)]
        self._commit(self.claim("plan"), outcome={"units": specs})

    def claim(self, kind: str) -> Claim:
        found = self.fleet.units.claim(self.job_id, "hand", (kind,))
        assert isinstance(found, Claim), (kind, found)
        return found

    def work(self, *records: dict[str, Any], **counters: float) -> None:
        """Commit the next unit with these records."""
        claim = self.claim("work")
        path = self._write(claim, records)
        entry = self.fleet.artifacts.adopt(
            claim, path, name=f"shard-{claim.number:05d}.jsonl", number=claim.number
        )
        done = {"rows_done": len(records), "rows_ok": len(records), **counters}
        self._commit(claim, counters=done, manifest={entry.name: entry.to_text()})

    def journal(self, *records: dict[str, Any]) -> Claim:
        """Leave the next unit half done, its finished rows in a journal."""
        claim = self.claim("work")
        path = self._write(claim, records)
        entry = self.fleet.artifacts.entry(
            claim, path, name=f"journal/{claim.unit}", number=claim.number, complete=False
        )
        self.fleet.units.register_journal(claim, entry.to_text())
        return claim

    def finish(self) -> None:
        self._commit(self.claim("finalise"), outcome={"message": "done"})

    def _write(self, claim: Claim, records: tuple[dict[str, Any], ...]) -> Path:
        folder = self.fleet.artifacts.folder(self.job_id, "scratch", claim.stem)
        path = folder / "rows.jsonl"
        lines = (json.dumps(item, separators=(",", ":")) + "\n" for item in records)
        path.write_text("".join(lines), encoding="utf-8")
        return path

    def _commit(self, claim: Claim, **options: Any) -> None:
        options.setdefault("counters", {})
        self.fleet.units.commit(claim, complete=True, **options)
