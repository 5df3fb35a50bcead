"""The way to the public harnesses and back: predictions for them, and what they reported."""

from __future__ import annotations

__all__ = ["IMPORTED", "Exported", "Imported", "export_predictions", "read_harness_report"]

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from spider_sdk.errors import UsageError
from spider_worker.evaluation.standing import judgeable
from spider_worker.evaluation.verdict import Group, Report
from spider_worker.sinks.atomic import atomic_path
from spider_worker.trajectories.output_file import read_index

#: The policy of a report that comes from a public harness.
IMPORTED: Final = "harness"

_TESTS: Final = {"FAIL_TO_PASS": "fail_to_pass", "PASS_TO_PASS": "pass_to_pass"}
_RESOLVED: Final = frozenset({"resolved_ids", "ids_resolved"})


@dataclasses.dataclass(frozen=True)
class Exported:
    """``left_out`` is the number of runs that are not ``judgeable``."""

    files: tuple[Path, ...]
    left_out: int


def export_predictions(source: Path, target: Path, *, model: str | None = None) -> Exported:
    """Write ``{instance_id, model_name_or_path, model_patch}`` for the records of ``source`` (an
    ``output.jsonl``) that count and can be judged.

    A harness keeps one prediction an instance, so independent runs of the same instances go to
    files of their own: ``target`` has the first of them, ``target`` with ``-n1`` in its name the
    second. ``model`` None: the records' own. Raises UsageError for a line that is no record.
    """
    index = read_index(source)
    lines: dict[int, list[str]] = {0: []}
    left_out = 0
    for (instance_id, n), entry in index.latest.items():
        record = index.load(entry)
        if not judgeable(record):
            left_out += 1
            continue
        prediction = {
            "instance_id": instance_id,
            "model_name_or_path": model or record.model or "unknown",
            "model_patch": record.git_patch or "",
        }
        lines.setdefault(n, []).append(json.dumps(prediction) + "\n")
    written = []
    for n in sorted(lines):
        path = target if n == 0 else target.with_name(f"{target.stem}-n{n}{target.suffix}")
        with atomic_path(path) as temporary:
            temporary.write_text("".join(lines[n]), "utf-8")
        written.append(path)
    return Exported(tuple(written), left_out)


@dataclasses.dataclass(frozen=True)
class Imported:
    """``reports`` are by the ids of instances that were asked for, ``unknown`` the ids of others
    that the harness names, ``silent`` those asked for of which it says nothing."""

    reports: Mapping[str, Report]
    unknown: tuple[str, ...]
    silent: tuple[str, ...]


def read_harness_report(path: Path, instances: frozenset[str]) -> Imported:
    """Read a run's report (``resolved_ids`` …, SWE-smith's ``ids_resolved`` too), one instance's
    ``report.json``, or a folder with such files below it; an instance's own says more and goes
    before the run's. ``instances`` are the ids asked for.

    Raises UsageError where a file is none of these, or a folder holds none.
    """
    found: dict[str, Report] = {}
    detailed: dict[str, Report] = {}
    if path.is_dir():
        contents = [(file, _load(file)) for file in sorted(path.rglob("*.json"))]
    else:
        contents = [(path, _load(path))]
    read = 0
    for file, content in contents:
        if _RESOLVED & set(content):
            found.update(_run_reports(content))
        elif reports := _instance_reports(file, content):
            detailed.update(reports)
        else:
            continue
        read += 1
    if read == 0:
        raise UsageError(f"{path} holds no report of a harness: no resolved_ids, and no instance's")
    found.update(detailed)
    return Imported(
        reports={name: report for name, report in found.items() if name in instances},
        unknown=tuple(sorted(set(found) - instances)),
        silent=tuple(sorted(instances - set(found))),
    )


def _load(file: Path) -> dict[str, Any]:
    """A file's object; empty where it holds something else."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as a harness's report: {error}") from error
    return content if isinstance(content, dict) else {}


def _run_reports(content: Mapping[str, Any]) -> dict[str, Report]:
    """Instances without a prediction (``incomplete_ids``) were not judged: nothing is said."""
    reports = {}
    for name in content.get("error_ids") or ():
        reports[name] = _of_harness(None, error_eval=True, error="the harness reports an error")
    for name in content.get("empty_patch_ids") or ():
        reports[name] = _of_harness(False, empty_generation=True)
    for key, resolved in (("unresolved_ids", False), ("resolved_ids", True)):
        # Two orders of the words: SWE-bench's, and SWE-smith's.
        for name in content.get(key) or content.get("ids_" + key.removesuffix("_ids")) or ():
            reports[name] = _of_harness(resolved)
    return reports


def _instance_reports(file: Path, content: Mapping[str, Any]) -> dict[str, Report]:
    """SWE-bench's has the instance's id as its only key; SWE-smith's is named by its folder."""
    if "resolved" in content or "timed_out" in content:
        return {file.parent.name: _instance_report(content)}
    return {
        name: _instance_report(report)
        for name, report in content.items()
        if isinstance(report, dict) and "resolved" in report
    }


def _instance_report(content: Mapping[str, Any]) -> Report:
    if content.get("timed_out"):
        return _of_harness(False, test_timeout=True)
    if content.get("patch_is_None") or content.get("patch_exists") is False:
        return _of_harness(False, empty_generation=True)
    if content.get("patch_successfully_applied") is False and not content.get("tests_status"):
        return _of_harness(False, failed_apply_patch=True)
    tests = content.get("tests_status")
    groups = {
        ours: Group(*(tuple(tests[theirs].get(key) or ()) for key in ("success", "failure")))
        for theirs, ours in _TESTS.items()
        if isinstance(tests, dict) and isinstance(tests.get(theirs), dict)
    }
    return _of_harness(bool(content["resolved"]), **groups)


def _of_harness(resolved: bool | None, **fields: Any) -> Report:
    return Report(resolved=resolved, policy=IMPORTED, **fields)
