"""Containers whose worker has died are swept, those of the living are not."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spider_worker.workspaces.docker import LABEL, DockerWorkspace
from spider_worker.workspaces.docker_owner import claim_owner, sweep_abandoned
from tests.support.boxes import bare_task
from tests.support.fake_docker import FakeDocker, running_engine
from tests.unit.workspaces.test_docker import IMAGE, TASK

# Opens a box, says so, and works on until its input ends.
WORKER = f"""
import asyncio, sys
from pathlib import Path
from spider_worker.swe_tasks.base import Origin, Task
from spider_worker.workspaces.docker import DockerWorkspace
from spider_worker.workspaces.docker_owner import claim_owner
async def main():
    folder = Path(sys.argv[1])
    workspace = DockerWorkspace(folder / "boxes", owner=claim_owner(folder / "owners"))
    async with workspace.open(Task("i-1", "tests/bare", "p", Origin("image", {IMAGE!r}))) as box:
        print(box.name, flush=True)
        await asyncio.to_thread(sys.stdin.read)
asyncio.run(main())
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDocker]:
    with running_engine(tmp_path, monkeypatch) as fake:
        bare_task(fake.image(IMAGE))
        yield fake


class Worker:
    """A worker on ``folder`` with one box."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.container = self._process.stdout.readline().strip()
        assert self.container.startswith("spider-")

    def die(self) -> None:
        self._process.kill()
        self._process.communicate()

    def end(self) -> None:
        self._process.communicate("")
        assert self._process.returncode == 0


def names(engine: FakeDocker) -> set[str]:
    return {path.name for path in engine.containers()}


def test_what_the_dead_left_is_swept_and_what_the_living_have_is_not(
    engine: FakeDocker, tmp_path: Path
) -> None:
    folder = tmp_path / "state"
    dead, living, another = Worker(folder), Worker(folder), Worker(tmp_path / "another state")
    dead.die()
    assert len(names(engine)) == 3

    async def use() -> None:
        workspace = DockerWorkspace(folder / "boxes", owner=claim_owner(folder / "owners"))
        async with workspace.open(TASK) as box:
            assert await sweep_abandoned(folder / "owners", folder / "boxes") == 1
            assert names(engine) == {living.container, another.container, box.name}
            assert (await box.run(["cat", "a.txt"], timeout=60)).text == "one\n"

    asyncio.run(use())
    assert len(list((folder / "boxes").iterdir())) == 1, "the vault of the living one"
    assert len(list((folder / "owners").iterdir())) == 2
    assert asyncio.run(sweep_abandoned(folder / "owners", folder / "boxes")) == 0
    for worker in (living, another):
        worker.end()
    assert not engine.containers()
    assert not list((folder / "boxes").iterdir())


def test_what_cannot_be_swept_is_left_for_the_next_time(engine: FakeDocker, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    Worker(folder).die()
    engine.fail("rm", "Error response from daemon: device or resource busy")
    assert asyncio.run(sweep_abandoned(folder / "owners", folder / "boxes")) == 0
    assert len(engine.containers()) == 1
    (engine.state / "fail").unlink()
    assert asyncio.run(sweep_abandoned(folder / "owners", folder / "boxes")) == 1
    assert not engine.containers()
    assert not list((folder / "owners").iterdir())
    assert not list((folder / "boxes").iterdir())


def test_a_process_has_one_name_and_its_containers_carry_it(
    engine: FakeDocker, tmp_path: Path
) -> None:
    assert asyncio.run(sweep_abandoned(tmp_path / "owners", tmp_path / "boxes")) == 0
    owner = claim_owner(tmp_path / "owners")
    assert owner == claim_owner(tmp_path / "owners")
    workspace = DockerWorkspace(tmp_path / "boxes", owner=owner)

    async def use() -> None:
        async with workspace.open(TASK):
            (vault,) = (tmp_path / "boxes").iterdir()
            assert vault.name.startswith(f"vault-{owner}-")

    asyncio.run(use())
    assert f"{LABEL}={owner}" in engine.calls("create")[0]
