"""The commit of Spider that a run was made with."""

from __future__ import annotations

import subprocess
from pathlib import Path

from spider_worker.trajectories.commit import _checked_out


def test_it_is_that_of_the_repository_which_holds_the_package(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=b", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    assert _checked_out(tmp_path) is None, "there is no commit yet"
    git("commit", "-q", "--allow-empty", "-m", "Start")
    assert _checked_out(tmp_path) == git("rev-parse", "HEAD")
    # An environment within somebody's own repository says nothing of Spider.
    (tmp_path / "site-packages").mkdir()
    assert _checked_out(tmp_path / "site-packages") is None
