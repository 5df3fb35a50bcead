"""The tasks of a run, found again from its metadata, and the workspaces to judge them in."""

from __future__ import annotations

__all__ = ["find_tasks", "open_workspace"]

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from spider_sdk.config.model import SourceConfig
from spider_sdk.errors import UsageError
from spider_worker.sources.build import build_source
from spider_worker.swe_tasks.base import Task
from spider_worker.swe_tasks.normalise import form_of, to_task
from spider_worker.trajectories.layout import is_local
from spider_worker.workspaces.base import Workspace
from spider_worker.workspaces.bwrap import BwrapWorkspace
from spider_worker.workspaces.docker import DockerWorkspace
from spider_worker.workspaces.docker_owner import claim_owner
from spider_worker.workspaces.local import LocalWorkspace

#: Where a row was changed on its way to a server: the reference is no file here.
_UPLOADED: Final = "input:"


def find_tasks(dataset: str, split: str, instances: frozenset[str]) -> dict[str, Task]:
    """The data set's tasks with these ids, by id: of a file of JSON lines on this machine, or of a
    set on the Hub. Raises UsageError where there is no such file, FatalJobError for a data set that
    cannot be had or holds no tasks."""
    path = Path(dataset).expanduser()
    if path.is_file() or is_local(dataset):
        rows, folder = _file_rows(path), str(path.absolute().parent)
    else:
        rows, folder = _hub_rows(dataset, split), "."
    columns: set[str] = set()
    chosen: list[Mapping[str, Any]] = []  # alone: the whole set may be larger than the memory
    for row in rows:
        columns.update(row)
        if row.get("instance_id") in instances:
            chosen.append(row)
    form = form_of(columns)
    return _by_id(to_task(row, form=form, folder=folder) for row in chosen)


def _by_id(tasks: Iterable[Task | None]) -> dict[str, Task]:
    return {task.instance_id: task for task in tasks if task is not None}


def _file_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _row(path, number, line)
    except FileNotFoundError as error:
        raise UsageError(
            f"the data set {path} is not here; name the file with --dataset"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the data set {path} cannot be read: {error}") from error


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{path}, line {number}: no JSON ({error})") from error
    if not isinstance(row, dict):
        raise UsageError(f"{path}, line {number}: expected an object, one task a line")
    if str(row.get("repo_source") or "").startswith(_UPLOADED):
        raise UsageError(
            f"{path}, line {number}: repo_source refers to a file on a server; give the data set "
            "that the job was made of"
        )
    return row


def _hub_rows(dataset: str, split: str) -> Iterator[Mapping[str, Any]]:
    source = build_source(SourceConfig(dataset, split=split), {}, None, os.environ.get("HF_TOKEN"))
    try:
        for batch in source.batches(0, None):
            for _, row in batch:
                yield row
    finally:
        source.close()


def open_workspace(kind: str, root: Path, *, owners: Path, allow_local: bool) -> Workspace:
    """Boxes of that kind under ``root``. ``owners`` is a folder that outlives the process: by it
    the next one knows the containers of one that was killed. Raises UsageError for a kind that
    there is not."""
    match kind:
        case "docker":
            return DockerWorkspace(root, owner=claim_owner(owners))
        case "bwrap":
            return BwrapWorkspace(root, allow_private=True)
        case "local":
            return LocalWorkspace(root, allowed=allow_local, allow_private=True)
    raise UsageError(f"workspace is docker, bwrap or local, not {kind!r}")
