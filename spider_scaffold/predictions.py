"""The way to the public harnesses and back, as options of ``spider-scaffold evaluate``."""

from __future__ import annotations

__all__ = ["export_to", "import_from"]

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spider_scaffold.report import counted
from spider_sdk.cli.state import State
from spider_sdk.errors import UsageError
from spider_worker.evaluation.evaluate import with_report
from spider_worker.evaluation.predictions import export_predictions, read_harness_report
from spider_worker.evaluation.verdict import patch_digest
from spider_worker.trajectories.output_file import read_index, rewrite
from spider_worker.trajectories.record import Record


def export_to(state: State, output: Path, target: Path) -> None:
    try:
        written = export_predictions(output, target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}") from error
    if state.json:
        state.emit({"predictions": [str(path) for path in written]})
    for path in written:
        state.say(f"predictions are in {path}")


def import_from(state: State, output: Path, report: Path, n: int) -> None:
    """Put the verdicts of a harness on the runs of number ``n`` into the file. Raises UsageError
    where the report is none, or says nothing of any of them."""
    latest = {key: entry for key, entry in read_index(output).latest.items() if key[1] == n}
    found = read_harness_report(report, frozenset(instance for instance, _ in latest))
    if not found.reports:
        raise UsageError(f"{report} says nothing of the instances of run {n} in {output}")

    def change(record: Record) -> Mapping[str, Any]:
        said = found.reports.get(record.instance_id)
        entry = latest.get(record.key)
        if said is None or entry is None or entry.attempt != record.attempt:
            return record.data
        digest = patch_digest(record.git_patch or "")
        return with_report(record.data, dataclasses.replace(said, patch_sha256=digest))

    rewrite(output, change)
    if found.unknown:
        state.note(
            f"warning: not in {output}: {counted(len(found.unknown), 'instance')} of the report"
        )
    if found.silent:
        state.note(f"warning: the report says nothing of {counted(len(found.silent), 'instance')}")
    if state.json:
        state.emit({"imported": sorted(found.reports)})
    state.say(f"taken over from {report}: {counted(len(found.reports), 'verdict')}")
