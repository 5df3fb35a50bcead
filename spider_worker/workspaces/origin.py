"""The tree of a task's origin at its base commit, in a folder of this host."""

from __future__ import annotations

__all__ = ["check_out"]

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from spider_sdk.errors import WorkspaceError
from spider_worker.swe_tasks.base import Task
from spider_worker.workspaces.git import run_git
from spider_worker.workspaces.remote import remote_options


async def check_out(task: Task, tree: Path, *, allow_private: bool = False) -> None:
    """Put the origin's repository, with its history, into ``tree``, which must not be there yet.
    ``allow_private`` lets its address be a private one.

    Raises WorkspaceError where the origin or the commit cannot be had.
    """
    origin = task.origin
    if origin.kind == "image":
        raise WorkspaceError(
            f"{task.instance_id} comes as the container image {origin.ref}: only a workspace of"
            " kind docker can open that"
        )
    source = _source(task)
    options: Sequence[str] = ()
    if origin.kind == "git":
        options = await asyncio.to_thread(remote_options, origin.ref, allow_private=allow_private)
    # No hard links: an agent that writes to its objects would change the origin's.
    await run_git(
        "clone", "--quiet", "--no-checkout", "--no-hardlinks", "--no-tags", "--", source, str(tree),
        cwd=tree.parent,
        options=options,
    )  # fmt: skip
    commit = task.base_commit
    if commit is not None:
        await _have(task, commit, tree, options)
    await run_git("checkout", "--quiet", "--force", "--detach", commit or "HEAD", "--", cwd=tree)


def _source(task: Task) -> str:
    if task.origin.kind == "git":
        return task.origin.ref
    source = os.path.abspath(task.origin.ref)
    # Git takes what is no path that it finds for an address to fetch from.
    if not os.path.exists(source):
        raise WorkspaceError(f"{task.instance_id}: there is no repository at {source}")
    return source


async def _have(task: Task, commit: str, tree: Path, options: Sequence[str]) -> None:
    """Bring in a commit that no branch of the origin leads to."""
    if commit.startswith("-"):
        raise WorkspaceError(f"{task.instance_id}: {commit!r} is no commit")
    try:
        await run_git("cat-file", "-e", f"{commit}^{{commit}}", cwd=tree)
        return
    except WorkspaceError:
        pass
    try:
        await run_git("fetch", "--quiet", "--no-tags", "origin", commit, cwd=tree, options=options)
        await run_git("cat-file", "-e", f"{commit}^{{commit}}", cwd=tree)
    except WorkspaceError as error:
        raise WorkspaceError(
            f"{task.instance_id}: {task.origin.ref} has no commit {commit}: {error.message}"
        ) from error
