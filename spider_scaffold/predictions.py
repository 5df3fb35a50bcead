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
from spider_worker.evaluation.standing import judgeable, known_verdict
from spider_worker.evaluation.verdict import patch_digest
from spider_worker.trajectories.output_file import read_index, rewrite
from spider_worker.trajectories.record import Record


def export_to(state: State, output: Path, target: Path) -> None:
    try:
        exported = export_predictions(output, target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}") from error
    if state.json:
        files = [str(path) for path in exported.files]
        state.emit({"predictions": files, "left_out": exported.left_out})
    for path in exported.files:
        state.say(f"predictions are in {path}")
    if exported.left_out:
        state.say(f"left out, kept from their end: {counted(exported.left_out, 'run')}")


def import_from(state: State, output: Path, report: Path, n: int) -> None:
    """Put the verdicts of a harness on the runs of number ``n`` into the file; one that says
    nothing of a patch takes no earlier verdict away. Raises UsageError where the report is none, or
    says nothing of any of them."""
    index = read_index(output)
    latest = {
        key: entry
        for key, entry in index.latest.items()
        if key[1] == n and judgeable(index.load(entry))
    }
    found = read_harness_report(report, frozenset(instance for instance, _ in latest))
    if not found.reports:
        raise UsageError(f"{report} says nothing of the instances of run {n} in {output}")

    def change(record: Record) -> Mapping[str, Any]:
        said = found.reports.get(record.instance_id)
        entry = latest.get(record.key)
        if said is None or entry is None or entry.attempt != record.attempt:
            return record.data
        if said.resolved is None and known_verdict(record) is not None:
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
