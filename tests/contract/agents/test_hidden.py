"""An agent whose interpreter lies beside what its worker keeps."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spider_worker.agents.pool import AgentPool
from tests.contract.agents.conftest import Stage
from tests.contract.agents.test_episodes import observations, shell


def test_what_the_worker_keeps_beside_an_interpreter_is_not_seen(
    run: Any, python: str, tmp_path: Path
) -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("no bubblewrap (make system installs it)")
    prefix = tmp_path / "prefix"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True)
    state = prefix / "state"
    state.mkdir()
    for place in (state / "key", prefix / "shown"):
        place.write_text("the-secret")
    pool = AgentPool(
        python,
        folder=state / "pool",
        boxes=state / "boxes",
        shell_python=str(prefix / "bin" / "python"),
        hidden=(state,),
    )
    run(pool.start())
    try:
        stage = Stage(pool, run, state, tmp_path)
        (stage.tree / "a.txt").write_text("the tree")
        look = f"cat {prefix}/shown; cat {state}/key; ls -A {state}; cat a.txt; touch {state}/mine"
        heard = stage.play([shell(look)])
    finally:
        run(pool.close())
    said = observations(heard)[0]
    assert said.count("the-secret") == 1
    assert "the tree" in said
    assert "pool" not in said
    assert "Read-only file system" in said
    assert not (state / "mine").exists()
