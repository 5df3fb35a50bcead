"""Git repositories on their way to a worker: each as one bundle file."""

from __future__ import annotations

__all__ = ["bundle_folder", "is_bundle"]

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from spider_sdk.errors import UsageError

_HEADS: Final = (b"# v2 git bundle\n", b"# v3 git bundle\n")


def is_bundle(path: Path) -> bool:
    """Does the file begin as git's bundles do? Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(_HEADS[0])) in _HEADS


def bundle_folder(folder: Path, commits: Iterable[str], target: Path) -> None:
    """Write every branch and tag of the repository ``folder``, and ``commits`` wherever they
    stand in it, to the bundle ``target``. What is not committed stays here.

    The same repository gives the same bytes, so that what is uploaded already is known again.
    Raises UsageError with what is wrong with the folder.
    """
    top = _git(folder, "rev-parse", "--is-bare-repository", "--is-shallow-repository")
    if top is None:
        raise UsageError(f"{folder} is no git repository: run git init and commit there")
    bare, shallow = top.split()
    root = _git(folder, "rev-parse", "--absolute-git-dir" if bare == "true" else "--show-toplevel")
    if root is None or Path(root.strip()).resolve() != folder.resolve():
        raise UsageError(f"{folder} is no git repository of its own: run git init and commit there")
    if shallow == "true":
        raise UsageError(
            f"{folder} is a shallow clone, which lacks the history that a bundle needs: run git "
            "fetch --unshallow there"
        )
    found = []
    for commit in commits:
        one = _git(
            folder, "rev-parse", "--verify", "--quiet", "--end-of-options", commit + "^{commit}"
        )
        if one is None:
            raise UsageError(f"{folder} has no commit {commit}")
        found.append(one.strip())
    # One thread: several would cut the same objects into deltas of another shape each time.
    making = ("-c", "pack.threads=1", "bundle", "create", "--quiet", str(target.absolute()))
    made = _run(folder, *making, "--all", *sorted(set(found)))
    if made.returncode:
        raise UsageError(f"{folder} cannot be bundled: {_last_line(made.stderr)}")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, None where it fails."""
    done = _run(folder, *arguments)
    return None if done.returncode else done.stdout


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # In a hook, git's own variables point at the repository that runs it.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        return subprocess.run(  # noqa: S603 (no shell; the arguments are ours)
            ["git", "-C", str(folder), *arguments],  # noqa: S607 (the user's own git)
            env=env, capture_output=True, text=True, errors="replace", check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError:
        raise UsageError("git is not installed here, and local repositories need it") from None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["git says nothing"])[-1]
