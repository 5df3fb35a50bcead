"""A run's patches judged on this machine, and said how it goes."""

from __future__ import annotations

__all__ = ["Settings", "judge", "say_tree"]

import asyncio
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from spider_scaffold.jobfile import FOLDER
from spider_scaffold.report import counted, summary
from spider_scaffold.tasks import find_tasks, open_workspace
from spider_sdk import settings
from spider_sdk.cli.options import load_config
from spider_sdk.cli.state import Detached, State
from spider_sdk.config.model import SweConfig
from spider_sdk.errors import JobFailed, UsageError
from spider_worker.evaluation.evaluate import Judged, Summary, evaluate_file
from spider_worker.evaluation.verdict import Report
from spider_worker.settings import WorkerSettings
from spider_worker.trajectories.layout import METADATA
from spider_worker.trajectories.metadata import read_metadata
from spider_worker.trajectories.output_file import read_index
from spider_worker.workspaces.docker_owner import sweep_abandoned


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of which tasks the records are, and how they are judged. ``timeout`` is in seconds.
    ``allow_local``: workspace local was asked for in so many words."""

    dataset: str
    split: str
    workspace: str
    num_workers: int
    timeout: float
    allow_local: bool

    @classmethod
    def gather(
        cls,
        output: Path,
        config: Path | None,
        *,
        dataset: str | None,
        split: str | None,
        workspace: str | None,
        num_workers: int | None,
        timeout: float | None,
    ) -> Self:
        """A flag goes before the config, that before ``metadata.json`` beside the file. Raises
        UsageError where nothing names the data set."""
        swe = _swe(config)
        before = read_metadata(output.with_name(METADATA)) or {}
        named = dataset or (swe.dataset if swe else None) or before.get("dataset")
        if not named:
            raise UsageError(
                f"there is no {METADATA} beside {output} that names its data set: give --dataset"
            )
        allowed = settings.load(WorkerSettings).allow_local_workspace
        return cls(
            dataset=str(named),
            split=split or (swe.split if swe else None) or before.get("data_split") or "train",
            workspace=workspace or (swe.workspace if swe else None) or _workspace(before),
            num_workers=num_workers or (swe.num_workers if swe else 1),
            timeout=timeout or (swe.timeout_seconds if swe else SweConfig.timeout_seconds),
            allow_local=workspace == "local" or allowed,
        )


def _swe(config: Path | None) -> SweConfig | None:
    if config is None:
        return None
    swe = load_config(config).swe
    if swe is None:
        raise UsageError(f"{config} is no SWE job, so it names no tasks")
    return swe


def _workspace(metadata: Mapping[str, Any]) -> str:
    details = metadata.get("details")
    named = details.get("workspace") if isinstance(details, Mapping) else None
    return str(named or SweConfig.workspace)


def judge(state: State, output: Path, how: Settings, *, reruns: int, force: bool) -> None:
    """Judge what is not judged yet, with a line for each. Raises JobFailed where patches were to
    be judged and nothing could be said of any."""
    instances = frozenset(key[0] for key in read_index(output).latest)
    if not instances:
        raise UsageError(f"{output} holds no records")
    tasks = find_tasks(how.dataset, how.split, instances)
    ours = output.parent / FOLDER
    owners = ours / "owners"
    with tempfile.TemporaryDirectory(prefix="spider-evaluate-") as folder:
        root = Path(folder)
        if how.workspace == "docker":
            asyncio.run(sweep_abandoned(owners, root))
        workspace = open_workspace(how.workspace, root, owners=owners, allow_local=how.allow_local)
        work = evaluate_file(
            output,
            tasks,
            workspace,
            num_workers=how.num_workers,
            timeout=how.timeout,
            reruns=reruns,
            cache=ours / "gold-checks",
            force=force,
            on_result=lambda judged: _say(state, judged),
        )
        try:
            found = asyncio.run(work)
        except KeyboardInterrupt:
            raise Detached(
                f"stopped; what was judged by then is in {output}. Go on with the same command"
            ) from None
    _conclude(state, output, how, found)


def _say(state: State, judged: Judged) -> None:
    report = judged.report
    if state.json:
        named = {"instance_id": judged.instance_id, "n": judged.n, "attempt": judged.attempt}
        state.emit({"event": "judged", **named, "report": report.to_json()})
        return
    run = f" (run {judged.n})" if judged.n else ""
    state.say(f"{judged.instance_id}{run}: {verdict(report)} ({report.seconds:.1f} s)")


def verdict(report: Report) -> str:
    """In words."""
    if report.resolved:
        word = "resolved"
        return f"{word}, flaky: {', '.join(report.flaky)}" if report.flaky else word
    if report.resolved is None:
        kind = "invalid task" if report.invalid_task else "cannot be judged"
        return f"{kind}: {report.error or 'no reason given'}"
    if report.empty_generation:
        return "not resolved: the patch is empty"
    if report.failed_apply_patch:
        return "not resolved: the patch does not apply"
    if report.test_timeout:
        return "not resolved: the tests ran past their time"
    groups = (report.fail_to_pass, report.pass_to_pass)
    failed = [test for group in groups if group for test in group.failed]
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    return f"not resolved: {', '.join(failed[:3])}{more}"


def _conclude(state: State, output: Path, how: Settings, found: Summary) -> None:
    if found.unknown:
        names = ", ".join(found.unknown[:5]) + (" …" if len(found.unknown) > 5 else "")
        state.note(
            f"warning: left out, since {how.dataset} ({how.split}) does not have them: "
            f"{counted(len(found.unknown), 'instance')} ({names})"
        )
    if found.torn:
        state.note(f"warning: {output} ends with a torn line, which is no record")
    if state.json:
        state.emit({"evaluation": dataclasses.asdict(found)})
    else:
        parts = [f"{found.judged} judged: {found.resolved} resolved, {found.unresolved} not"]
        parts += [f"{found.undecided} undecided"] if found.undecided else []
        parts += [f"{found.flaky} flaky"] if found.flaky else []
        parts += [f"{found.skipped} judged before"] if found.skipped else []
        parts += [f"{found.kept} earlier verdicts kept"] if found.kept else []
        parts += [f"{found.unjudged} not judged, kept from their end"] if found.unjudged else []
        state.say(" · ".join(parts))
    say_tree(state, output)
    if found.undecided - found.invalid == found.judged > 0:
        raise JobFailed("nothing could be said of any patch; the reports in the file tell why")


def say_tree(state: State, output: Path) -> None:
    """The table of what the file holds."""
    made = summary(read_index(output))
    if state.json:
        state.emit({"output": str(output), "summary": made.to_json()})
    for line in made.lines():
        state.say(line)
