"""A worker that keeps its things under a folder that boxes are shown."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from spider_worker.workspaces.bwrap import BwrapWorkspace
from tests.support.boxes import bare_task


def test_what_the_worker_keeps_beside_an_interpreter_is_not_seen(tmp_path: Path) -> None:
    prefix = tmp_path / "prefix"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True)
    state = prefix / "state"
    (state / "inner").mkdir(parents=True)
    for place in (state / "key", state / "inner" / "key", prefix / "shown"):
        place.write_text("the-secret")
    workspace = BwrapWorkspace(
        state / "boxes",
        python=str(prefix / "bin" / "python"),
        hidden=(state, state / "inner", tmp_path / "elsewhere"),
    )
    look = f"cat {prefix}/shown; ls -A {state}; cat {state}/key; cat a.txt; touch {state}/mine"

    async def main() -> str:
        async with workspace.open(bare_task(tmp_path / "repo")) as box:
            return (await box.run(["bash", "-c", look], timeout=60)).text

    said = asyncio.run(main())
    assert said.startswith("the-secretcat: "), "the interpreter's prefix is shown, the state empty"
    assert said.count("the-secret") == 1
    assert "one\n" in said
    assert "Read-only file system" in said
    assert not (state / "mine").exists()
