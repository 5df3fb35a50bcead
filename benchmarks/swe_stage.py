"""Jobs of coding agents for the benchmarks: real boxes and the real SDK, every phase timed.

The pipeline's own parts are wrapped where it asks for a workspace and for a host, so that what is
timed is what a worker does, at the price of a clock's reading.
"""

from __future__ import annotations

__all__ = ["Instance", "Jobs", "Ran", "descendants", "holding"]

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spider_sdk.config.model import InputFile, SweConfig
from spider_sdk.errors import JobCancelled
from spider_worker.agents.episode import Heard
from spider_worker.agents.interpreter import agent_python
from spider_worker.pipelines.local import LocalContext, LocalStore, run_job_locally
from spider_worker.pipelines.swe_agent.build import real_parts
from spider_worker.pipelines.swe_agent.parts import Host, Parts
from spider_worker.pipelines.swe_agent.pipeline import SweAgentPipeline
from spider_worker.settings import WorkerSettings
from spider_worker.swe_tasks.base import Task
from spider_worker.workspaces.base import Box, Workspace
from tests.support.swe_repos import SweRepo


@dataclasses.dataclass
class Instance:
    """One instance: how it ended, and how many seconds each phase took. ``event`` and ``start``
    count from the request for a process: to the conversation's first event, and until the model
    is asked (``ready``). ``left`` are processes that are alive when the episode is said to have
    ended, ``hung`` whether the tree has the file ``hung`` then; ``ending`` counts from the job's
    cancel to that end, where it was cancelled."""

    status: str = ""
    turns: int = 0
    open: float = 0.0
    prepare: float = 0.0
    event: float = 0.0
    start: float = 0.0
    work: float = 0.0
    take_patch: float = 0.0
    close: float = 0.0
    left: int = 0
    hung: bool = False
    ending: float = 0.0


@dataclasses.dataclass(frozen=True)
class Ran:
    """A job that ran. ``seconds`` are from the first ``instance.started`` to the last
    ``instance.ended``: planning and the pool's imports are over by then."""

    seconds: float
    instances: Sequence[Instance]
    patches: Sequence[str | None]

    def medians(self) -> dict[str, float]:
        """Seconds a phase."""
        phases = ("open", "prepare", "event", "start", "work", "take_patch", "close")
        return {name: _median([getattr(one, name) for one in self.instances]) for name in phases}


class Jobs:
    """Runs jobs under ``folder``. ``repos`` are taken in turn."""

    def __init__(self, folder: Path, repos: Sequence[SweRepo]) -> None:
        self.folder = folder
        self.repos = repos
        self._number = 0

    def rows(self, count: int, part: Callable[[int], str]) -> list[dict[str, Any]]:
        """Rows of the offline format, their model to play ``part`` of each one's number."""
        rows = []
        for number in range(count):
            repo = self.repos[number % len(self.repos)]
            row = repo.row(source="bundle")
            row["instance_id"] += f"-{number}"
            row["problem_statement"] += f"\n[[part:{part(number)}]]"
            rows.append(row)
        return rows

    def run(
        self,
        rows: Sequence[Mapping[str, Any]],
        base_url: str,
        *,
        workers: int,
        marker: str | None = None,
        cancel: bool = False,
        **options: Any,
    ) -> Ran:
        """A job of its own, with a pool of its own, of ``workers`` instances at a time.
        ``marker`` stands in the command lines of what the agents start: with it, and one worker,
        processes that are left are looked for. ``cancel`` has the job cancelled as soon as a tree
        has the file ``hung``."""
        self._number += 1
        folder = self.folder / f"job-{self._number}"
        folder.mkdir()
        inputs = {_digest(repo.bundle): repo.bundle for repo in self.repos}
        references = {str(path): f"input:{digest}" for digest, path in inputs.items()}
        tasks = folder / "tasks.jsonl"
        tasks.write_text(
            "".join(
                json.dumps({**row, "repo_source": references[row["repo_source"]]}) + "\n"
                for row in rows
            )
        )
        inputs[_digest(tasks)] = tasks
        job = SweConfig(
            llm_model="scripted",
            llm_base_url=base_url,
            dataset=tasks.name,
            workspace="bwrap",
            num_workers=workers,
            max_retries=0,
            inputs=tuple(InputFile(path.name, digest) for digest, path in inputs.items()),
            **options,
        )
        return asyncio.run(self._run(folder, job, inputs, marker, cancel))

    async def _run(
        self,
        folder: Path,
        job: SweConfig,
        inputs: Mapping[str, Path],
        marker: str | None,
        cancel: bool,
    ) -> Ran:
        settings = WorkerSettings(
            state=folder / "state", agent_python=agent_python(None), allow_private_urls=True
        )
        clock = _Clock(marker)
        store = LocalStore(folder / "store")
        ctx = LocalContext(store, job, inputs=inputs, on_event=clock.take)
        pipeline = SweAgentPipeline(job, clock.wrap(real_parts(settings)))
        outputs = [folder / "store" / "artifacts" / "output.jsonl"]
        if cancel:
            clock.cancel = ctx.cancel
            with contextlib.suppress(JobCancelled):
                await run_job_locally(pipeline, ctx, overlap=job.num_workers)
            outputs = [shard.path for shard in store.shards()]
        else:
            await run_job_locally(pipeline, ctx, overlap=job.num_workers)
        records = [json.loads(line) for path in outputs for line in path.read_text().splitlines()]
        for record in records:
            instance = clock.instances[record["instance_id"]]
            instance.status, instance.turns = record["status"], record["metrics"]["turns"]
        patches = [record["test_result"]["git_patch"] for record in records]
        return Ran(clock.last - clock.first, list(clock.instances.values()), patches)


class _Clock:
    def __init__(self, marker: str | None) -> None:
        self.first = self.last = 0.0
        self.instances: dict[str, Instance] = {}
        self.boxes: dict[int, tuple[Instance, float]] = {}  # by a box's id: since when it is open
        self.gone: dict[int, float] = {}  # by a box's id: when its episode was over
        self.marker = marker
        self.cancel: Callable[[], None] | None = None
        self.cancelled = 0.0

    def take(self, _level: str, code: str, _message: str, _data: Mapping[str, Any]) -> None:
        if code == "instance.started":
            self.first = self.first or time.monotonic()
        elif code == "instance.ended":
            self.last = time.monotonic()

    def wrap(self, parts: Parts) -> Parts:
        async def host(ctx: Any, endpoint: Any) -> Host:
            return _TimedHost(await parts.host(ctx, endpoint), self)

        return dataclasses.replace(
            parts,
            workspace=lambda ctx, endpoint: _TimedWorkspace(parts.workspace(ctx, endpoint), self),
            host=host,
        )


class _TimedWorkspace:
    def __init__(self, workspace: Workspace, clock: _Clock) -> None:
        self.kind = workspace.kind
        self._workspace = workspace
        self._clock = clock

    async def check(self) -> None:
        await self._workspace.check()

    @contextlib.asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[Box]:
        instance = self._clock.instances[task.instance_id] = Instance()
        began = time.monotonic()
        async with self._workspace.open(task) as box:
            opened = time.monotonic()
            instance.open = opened - began
            self._clock.boxes[id(box)] = (instance, opened)
            try:
                yield box
            finally:
                left = time.monotonic()
                instance.take_patch = left - self._clock.gone.pop(id(box), left)
                del self._clock.boxes[id(box)]
        instance.close = time.monotonic() - left


class _TimedHost:
    def __init__(self, host: Host, clock: _Clock) -> None:
        self._host = host
        self._clock = clock
        self.ticket = host.ticket
        self.close = host.close

    async def run(self, box: Any, request: Mapping[str, Any], **options: Any) -> Heard:
        instance, opened = self._clock.boxes[id(box)]
        listener = options.pop("listener")
        before = descendants() if self._clock.marker else set()
        asked = time.monotonic()
        instance.prepare = asked - opened

        def hear(line: Mapping[str, Any], heard: Heard) -> None:
            if line["op"] == "event" and not instance.event:
                instance.event = time.monotonic() - asked
            elif line["op"] == "ready":
                instance.start = time.monotonic() - asked
            listener(line, heard)

        cancelling = asyncio.create_task(self._cancel(box))
        try:
            return await self._host.run(box, request, listener=hear, **options)
        finally:
            cancelling.cancel()
            gone = self._clock.gone[id(box)] = time.monotonic()
            instance.work = gone - asked - instance.start
            if self._clock.marker:
                instance.left = len((descendants() - before) | holding(self._clock.marker))
                instance.hung = await box.read("hung") is not None
            if self._clock.cancelled:
                instance.ending = gone - self._clock.cancelled

    async def _cancel(self, box: Box) -> None:
        if self._clock.cancel is None:
            return
        while await box.read("hung") is None:  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.05)
        self._clock.cancelled = time.monotonic()
        self._clock.cancel()


def descendants() -> set[int]:
    """Ids of the processes that this one has started, and so on."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{entry}/stat").read_text()
                parent = int(stat[stat.rindex(")") + 2 :].split()[1])
                parents.setdefault(parent, []).append(int(entry))
    found: set[int] = set()
    waiting = [os.getpid()]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found.update(children)
        waiting += children
    return found


def holding(marker: str) -> set[int]:
    """Ids of the processes, whoever's children they are, with ``marker`` in their command line."""
    found = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                if marker.encode() in Path(f"/proc/{entry}/cmdline").read_bytes():
                    found.add(int(entry))
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else float("nan")
