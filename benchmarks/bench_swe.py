"""Coding agents beside a bare loop of OpenHands' SDK; how they scale, start and end.

    python -m benchmarks.bench_swe [overhead scaling start timeout cancel] [--instances 32 …]

Whole jobs of the pipeline in one process, in boxes of bubblewrap, on small repositories, against a
scripted model in a process of its own. An instance's *turns* are answers of the model, the one
that finishes among them. The bare loop is ``benchmarks/peers/bare_agents.py``. Agents share the
machine's cores with the loop that is measured, so figures of a busy machine say little.
"""

from __future__ import annotations

__all__ = ["cancel", "overhead", "scaling", "start", "swe", "timeout"]

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Figure
from benchmarks.swe_stage import Instance, Jobs, Ran
from spider_worker.agents.interpreter import agent_python
from spider_worker.pipelines.swe_agent.attempts import instruction
from spider_worker.swe_tasks.normalise import to_task
from tests.support.agent_model import spawn_model
from tests.support.swe_repos import SweRepo, make_repos

PEER = Path(__file__).parent / "peers" / "bare_agents.py"
TREE = "/testbed"
MAX_ITERATIONS = 30
HANG_SECONDS = 2.0
Turn = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured. Latencies are seconds that the model takes for a turn; ``rounds`` are
    pairs of a job and a bare loop; which comes first alternates."""

    instances: int = 32
    turns: int = 10
    workers: int = 4
    latency: float = 0.1
    rounds: int = 2
    scaling_instances: int = 8
    scaling_turns: int = 10
    scaling_workers: int = 4
    scaling_latency: float = 1.0
    scaling_rounds: int = 3
    starts: int = 20
    timeouts: int = 5
    cancels: int = 5


def swe(size: Size = Size(), names: Sequence[str] = ()) -> list[Figure]:
    figures: list[Figure] = []
    for name in names or _PARTS:
        with _stage() as jobs:
            figures += _PARTS[name](jobs, size)
    return figures


def overhead(jobs: Jobs, size: Size) -> list[Figure]:
    """The pipeline's time for its instances (see ``Ran.seconds``) over the bare loop's, which
    counts the same: both have imported the SDK, and end when the last patch is taken."""
    parts = _parts(jobs, size.instances, size.turns)
    ours: list[Ran] = []
    bare: list[dict[str, Any]] = []
    with spawn_model(jobs.folder, parts, latency=size.latency) as url:

        def run_ours() -> None:
            ran = jobs.run(jobs.rows(size.instances, lambda _: "ours"), url, workers=size.workers)
            _expect_work(ran, size.turns)
            ours.append(ran)

        def run_bare() -> None:
            bare.append(_run_bare(jobs, size, url))

        for number in range(size.rounds):
            for run in (run_ours, run_bare) if number % 2 else (run_bare, run_ours):
                run()
    seconds = [ran.seconds for ran in ours]
    bare_seconds = [run["seconds"] for run in bare]
    name = (
        f"agents, {size.instances} instances of {size.turns} turns, {size.workers} at a time: "
        "first start to last end over a bare SDK loop"
    )
    detail = {
        "seconds": seconds, "bare_seconds": bare_seconds, **dataclasses.asdict(size),
        "phases": [ran.medians() for ran in ours],
        "bare_phases": [
            {key: statistics.median(one[key] for one in run["instances"])
             for key in ("prepare", "conversation", "patch")}
            for run in bare
        ],
    }  # fmt: skip
    ratio = sum(seconds) / sum(bare_seconds)
    phases = ours[-1].medians()
    return [
        Figure(name, ratio, 1.05, at_least=False, detail=detail),
        Figure("  seconds of a job's instances", statistics.mean(seconds)),
        Figure("  seconds of the bare loop", statistics.mean(bare_seconds)),
        *(Figure(f"  an instance's seconds: {phase}", phases[phase]) for phase in _PHASES),
    ]


def scaling(jobs: Jobs, size: Size) -> list[Figure]:
    """One instance at a time, whose time is steady, over several, whose time is not."""
    instances, turns, workers = size.scaling_instances, size.scaling_turns, size.scaling_workers
    rows = jobs.rows(instances, lambda _: "ours")
    parts = _parts(jobs, instances, turns)
    with spawn_model(jobs.folder, parts, latency=size.scaling_latency) as url:
        alone = jobs.run(rows, url, workers=1)
        several = [jobs.run(rows, url, workers=workers) for _ in range(size.scaling_rounds)]
        bare_alone, *bare_several = (
            _run_bare(jobs, Size(instances=instances, turns=turns, workers=number), url)["seconds"]
            for number in (1, *(size.scaling_rounds * [workers]))
        )
    for ran in (alone, *several):
        _expect_work(ran, turns)
    name = (
        f"agents, {instances} instances of {turns} turns of {size.scaling_latency:g} s: "
        f"num_workers {workers} over 1, times faster, median of {size.scaling_rounds}"
    )
    seconds = [ran.seconds for ran in several]
    detail = {
        "seconds": {"alone": alone.seconds, "several": seconds},
        "bare_seconds": {"alone": bare_alone, "several": bare_several},
        "phases": {"alone": alone.medians(), "several": several[-1].medians()},
    }
    ratio = alone.seconds / statistics.median(seconds)
    bare_ratio = bare_alone / statistics.median(bare_several)
    return [
        Figure(name, ratio, 3.5, detail=detail),
        Figure("  the bare loop's, on these cores", bare_ratio),
    ]


def start(jobs: Jobs, size: Size) -> list[Figure]:
    """From the request for a process until the model is asked, one instance after another."""
    rows = jobs.rows(size.starts, lambda _: "talk")
    with spawn_model(jobs.folder, {"talk": [{"text": "It is fine as it is."}]}) as url:
        ran = jobs.run(rows, url, workers=1)
    ready = [one.start for one in ran.instances]
    events = [one.event for one in ran.instances]
    name = f"agents, start in the warm pool until the model is asked: median of {size.starts}, s"
    return [
        Figure(name, statistics.median(ready), 1.0, at_least=False,
               detail={"ready": ready, "first_event": events}),
        Figure("  until the conversation's first event", statistics.median(events)),
    ]  # fmt: skip


def timeout(jobs: Jobs, size: Size) -> list[Figure]:
    """A tool that hangs, with a child in a session of its own, past the hard timeout."""
    marker = f"97{os.getpid()}"
    rows = jobs.rows(size.timeouts, lambda _: "hang")
    with spawn_model(jobs.folder, {"hang": [_hang(marker)]}) as url:
        ran = jobs.run(rows, url, workers=1, marker=marker, timeout_seconds=HANG_SECONDS)
    _expect_ends(ran.instances, "timeout")
    hung = [one for one in ran.instances if one.hung]
    if not hung:
        raise RuntimeError("no tool had been called by the deadline: the machine is too busy")
    overruns = [one.work - HANG_SECONDS for one in ran.instances]
    name = f"agents, a hung tool's end after its timeout: the most of {size.timeouts}, s"
    return [
        Figure(name, max(overruns), 2.0, at_least=False,
               detail={"seconds": overruns, "tools_hung": len(hung)}),
        Figure("  processes left", sum(one.left for one in ran.instances), 0, at_least=False),
    ]  # fmt: skip


def cancel(jobs: Jobs, size: Size) -> list[Figure]:
    """The same tool, in jobs that are cancelled while it hangs."""
    marker = f"98{os.getpid()}"
    rows = jobs.rows(1, lambda _: "hang")
    instances = []
    with spawn_model(jobs.folder, {"hang": [_hang(marker)]}) as url:
        for _ in range(size.cancels):
            instances += jobs.run(rows, url, workers=1, marker=marker, cancel=True).instances
    _expect_ends(instances, "cancelled")
    seconds = [one.ending for one in instances]
    name = f"agents, a hung tool's end after its job's cancel: the most of {size.cancels}, s"
    return [
        Figure(name, max(seconds), 2.0, at_least=False, detail={"seconds": seconds}),
        Figure("  processes left", sum(one.left for one in instances), 0, at_least=False),
    ]


def _hang(marker: str) -> Turn:
    return _shell(f"setsid nohup sleep {marker} & touch hung; sleep {marker}")


def _expect_ends(instances: Sequence[Instance], status: str) -> None:
    statuses = [one.status for one in instances]
    if set(statuses) != {status}:
        raise RuntimeError(f"episodes were to end as {status}, and ended: {statuses}")


_PARTS = {"overhead": overhead, "scaling": scaling, "start": start, "timeout": timeout,
          "cancel": cancel}  # fmt: skip
_PHASES = ("open", "prepare", "start", "work", "take_patch", "close")


@contextlib.contextmanager
def _stage() -> Iterator[Jobs]:
    with tempfile.TemporaryDirectory(prefix="spider-bench-") as name:
        folder = Path(name)
        yield Jobs(folder, [repo for repo in make_repos(folder / "repos") if _is_plain(repo)])


def _is_plain(repo: SweRepo) -> bool:
    """Whether the bare loop's few lines of git prepare it rightly."""
    return bool(repo.bug_patch) and not repo.setup_cmds and repo.folder.name not in _TRICKY


_TRICKY = frozenset({"crlf", "nested"})


def _shell(command: str) -> Turn:
    return {"call": "terminal", "args": {"command": command}}


def _work(tree: str, turns: int) -> list[Turn]:
    """``turns`` less the one that finishes: a look around, a file written and read, a program."""
    written = {"command": "create", "path": f"{tree}/NOTES.md", "file_text": "One line.\n" * 20}
    steps = [
        {"call": "file_editor", "args": written},
        _shell("git log --oneline | cat; ls -A"),
        _shell("cat README.md"),
        {"call": "file_editor", "args": {"command": "view", "path": f"{tree}/NOTES.md"}},
        _shell("grep -rn def . | head -n 20"),
        _shell("git status --short"),
        _shell("find . -type f -not -path './.git/*' | wc -l"),
        _shell("python3 -c 'print(sum(range(10)))'"),
        _shell("git diff --stat"),
    ]
    more = [_shell(f"echo turn {number}") for number in range(len(steps), turns - 1)]
    return [*steps, *more][: turns - 1]


def _parts(jobs: Jobs, instances: int, turns: int) -> dict[str, list[Turn]]:
    """What the model plays: ``ours`` in all boxes, ``bare-N`` in each of the bare loop's trees."""
    bare = {f"bare-{n}": _work(str(_bare_tree(jobs, n)), turns) for n in range(instances)}
    return {"ours": _work(TREE, turns), **bare}


def _bare_tree(jobs: Jobs, number: int) -> Path:
    return jobs.folder / "bare" / str(number) / "tree"


def _expect_work(ran: Ran, turns: int) -> None:
    """A job that did less than was asked is no job to measure."""
    found = {(one.status, one.turns) for one in ran.instances}
    if found != {("finished", turns)} or not all(ran.patches):
        raise RuntimeError(f"instances were to finish after {turns} turns, and did: {found}")


def _run_bare(jobs: Jobs, size: Size, url: str) -> dict[str, Any]:
    folder = jobs.folder / "bare"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = jobs.rows(size.instances, lambda number: f"bare-{number}")
    tasks = [_bare_task(row, _bare_tree(jobs, number)) for number, row in enumerate(rows)]
    spec = {
        "workers": size.workers,
        "max_iterations": MAX_ITERATIONS,
        "llm": {"model": "openai/scripted", "base_url": url},
        "tasks": tasks,
    }
    paths = folder / "spec.json", folder / "out.json"
    paths[0].write_text(json.dumps(spec))
    quiet = {"OPENHANDS_SUPPRESS_BANNER": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with (folder / "log").open("wb") as log:
        subprocess.run(
            [agent_python(None), str(PEER), *map(str, paths)],
            check=True, stdout=log, stderr=log, env={**os.environ, **quiet},
        )  # fmt: skip
    done: dict[str, Any] = json.loads(paths[1].read_text())
    for one in done["instances"]:
        if (one["status"], one.get("turns")) != ("finished", size.turns) or not one["patch_bytes"]:
            raise RuntimeError(f"the bare loop's {one['id']} went wrong: {one}")
    return done


def _bare_task(row: Mapping[str, Any], tree: Path) -> dict[str, Any]:
    task = to_task(row, form="offline")
    assert task is not None
    return {
        "id": task.instance_id,
        "source": row["repo_source"],
        "base_commit": task.base_commit,
        "bug_patch": task.bug_patch,
        "instruction": instruction(task, str(tree)),
        "folder": str(tree.parent),
    }


def main() -> None:
    from benchmarks.report import table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="PART", help=", ".join(_PARTS))
    for field in dataclasses.fields(Size):
        kind = float if isinstance(field.default, float) else int
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=kind, default=field.default, help="(%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures, with their details")
    options = parser.parse_args()
    if unknown := set(options.names) - set(_PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    size = Size(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Size)})
    figures = swe(size, options.names)
    print(table(figures))
    if options.json is not None:
        options.json.write_text(json.dumps([one.to_json() for one in figures], indent=1))


if __name__ == "__main__":
    main()
