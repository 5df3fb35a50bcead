"""Containers as boxes: what docker is asked for, and what becomes of its failures."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from spider_sdk.errors import EngineUnavailable, WorkspaceError
from spider_worker.swe_tasks.base import Origin, Task
from spider_worker.workspaces.docker import LABEL, DockerBox, DockerWorkspace
from spider_worker.workspaces.repository import prepare, take_patch
from tests.support.boxes import alive, bare_task
from tests.support.fake_docker import FakeDocker, running_engine

IMAGE = "jyangballin/swesmith.x86_64.tests_1776_bare.1234"
TASK = Task(
    "i-1",
    "tests/bare",
    "p",
    Origin("image", IMAGE),
    bug_patch="--- a/a.txt\n+++ b/a.txt\n@@ -1 +1 @@\n-one\n+two\n",
)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDocker]:
    with running_engine(tmp_path, monkeypatch) as fake:
        bare_task(fake.image(IMAGE))
        yield fake


def in_box(
    workspace: DockerWorkspace, use: Callable[[DockerBox], Awaitable[object]], task: Task = TASK
) -> None:
    async def run() -> None:
        async with workspace.open(task) as box:
            await use(box)

    asyncio.run(run())


async def nothing(box: DockerBox) -> None: ...


def test_an_instance_is_prepared_and_its_patch_taken(engine: FakeDocker, tmp_path: Path) -> None:
    async def use(box: DockerBox) -> None:
        await prepare(box, TASK)
        assert await box.read("a.txt") == b"two\n"
        log = await box.run(["git", "log", "--all", "--format=%s"], timeout=60)
        assert log.text == "Start here\n"
        await box.put("new folder/x.sh", b"x\n", executable=True)
        assert await box.read("new folder/x.sh") == b"x\n"
        assert await box.read("new folder/x.sh", limit=1) == b"x"
        assert await box.read("none") is None
        patch = await take_patch(box)
        assert "+++ b/new folder/x.sh" in patch
        assert "new file mode 100755" in patch
        for name in ("../x", "/etc/passwd", ""):
            with pytest.raises(WorkspaceError, match="no name within the tree"):
                await box.read(name)
        await box.run(["ln", "-s", "/etc/passwd", "link"], timeout=60)
        with pytest.raises(WorkspaceError, match="no regular file"):
            await box.read("link")

    in_box(DockerWorkspace(tmp_path / "boxes"), use)
    assert engine.containers() == []
    assert list((tmp_path / "boxes").iterdir()) == []


def test_a_container_is_shut_in(engine: FakeDocker, tmp_path: Path) -> None:
    workspace = DockerWorkspace(
        tmp_path / "boxes",
        owner="worker-7",
        processes=99,
        memory_mb=512,
        mounts=[("/usr/share", "/opt/agent")],
    )
    in_box(workspace, nothing)
    (create,) = engine.calls("create")
    options = set(itertools.pairwise(create))
    assert {
        ("--label", f"{LABEL}=worker-7"),
        ("--network", "none"),
        ("--pids-limit", "99"),
        ("--memory", "512m"),
        ("--security-opt", "no-new-privileges"),
        ("--mount", "type=bind,source=/usr/share,target=/opt/agent,readonly"),
        ("--entrypoint", "sleep"),
        (IMAGE, "infinity"),
    } <= options
    assert "--init" in create
    vault = next(value for value in create if "target=/vault" in value)
    assert vault.endswith(",readonly")
    name = create[create.index("--name") + 1]
    assert engine.calls("start") == [["start", name]]
    assert engine.calls("rm") == [["rm", "-f", "-v", name]]


def test_commands_have_the_images_python_and_nothing_of_the_hosts(
    engine: FakeDocker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    async def use(box: DockerBox) -> None:
        done = await box.run(["sh", "-c", "pwd; env; cat; exit 5"], timeout=60, stdin=b"in",
                             env={"X": "y z"})  # fmt: skip
        assert done.code == 5
        assert done.text.startswith("/testbed\n")
        assert done.text.endswith("in")
        assert "X=y z\n" in done.text
        assert "hf_secret" not in done.text
        path = next(line for line in done.text.splitlines() if line.startswith("PATH="))
        assert path.startswith("PATH=/opt/miniconda3/envs/testbed/bin:")
        assert "/usr/bin:/bin" in path

    in_box(DockerWorkspace(tmp_path / "boxes"), use)
    assert all("HF_TOKEN" not in env for env in engine.environments())


def test_a_timeout_and_left_processes_end_with_the_container_restarted(
    engine: FakeDocker, tmp_path: Path
) -> None:
    marker = uuid.uuid4().hex

    async def use(box: DockerBox) -> None:
        assert (await box.run(["true"], timeout=60)).ok
        assert engine.calls("kill") == []
        assert (await box.run(["sh", "-c", f"sleep 600; : {marker}"], timeout=1)).code is None
        assert engine.calls("kill") == [["kill", box.name]]
        assert alive(marker) == []
        left = f"setsid sh -c 'sleep 600; : {marker}' </dev/null >/dev/null 2>&1 &"
        assert (await box.run(["sh", "-c", left], timeout=60)).ok
        assert len(engine.calls("kill")) == 2
        assert engine.calls()[-1] == ["start", box.name]
        assert alive(marker) == []
        assert (await box.run(["cat", "a.txt"], timeout=60)).text == "one\n"

    in_box(DockerWorkspace(tmp_path / "boxes"), use)


def test_cancelling_ends_what_runs_and_removes_the_container(
    engine: FakeDocker, tmp_path: Path
) -> None:
    async def run() -> None:
        async def work() -> None:
            async with DockerWorkspace(tmp_path / "boxes").open(TASK) as box:
                await box.run(["sh", "-c", "touch begun; sleep 600"], timeout=600)

        working = asyncio.create_task(work())
        while not list(engine.state.glob("containers/*/testbed/begun")):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working

    asyncio.run(run())
    assert [call[0] for call in engine.calls()[-3:]] == ["kill", "start", "rm"]
    assert engine.containers() == []


def test_a_network_is_there_for_the_command_that_asked(engine: FakeDocker, tmp_path: Path) -> None:
    async def use(box: DockerBox) -> None:
        await box.run(["true"], timeout=60, network=True)
        await box.run(["true"], timeout=60)

    in_box(DockerWorkspace(tmp_path / "boxes"), use)
    calls = [call[:-1] for call in engine.calls() if call[0] in ("exec", "network")]
    steps = [call if call[0] == "network" else ["exec"] for call in calls]
    assert steps == [
        ["network", "disconnect", "none"],
        ["network", "connect", "bridge"],
        ["exec"],
        ["network", "disconnect", "bridge"],
        ["network", "connect", "none"],
        ["exec"],
    ]
    in_box(DockerWorkspace(tmp_path / "boxes", network=True), use)
    assert len(engine.calls("network")) == 4
    create = engine.calls("create")[-1]
    assert create[create.index("--network") + 1] == "bridge"


def test_an_image_is_pulled_where_it_is_missing(engine: FakeDocker, tmp_path: Path) -> None:
    bare_task(engine.image("swebench/other:latest", pulled=False))
    task = Task("i-2", "r", "p", Origin("image", "swebench/other:latest"))
    workspace = DockerWorkspace(tmp_path / "boxes")
    in_box(workspace, nothing, task)
    in_box(workspace, nothing, task)
    assert engine.calls("pull") == [["pull", "--quiet", "swebench/other:latest"]]
    missing = Task("i-3", "r", "p", Origin("image", "no/such:latest"))
    with pytest.raises(WorkspaceError, match=r"no/such:latest cannot be pulled.*access denied"):
        in_box(workspace, nothing, missing)
    with pytest.raises(WorkspaceError, match="comes as a repository"):
        in_box(workspace, nothing, bare_task(tmp_path / "origin"))


def test_what_cannot_be_started_is_an_error_of_the_workspace(
    engine: FakeDocker, tmp_path: Path
) -> None:
    async def use(box: DockerBox) -> None:
        with pytest.raises(WorkspaceError, match="no such file"):
            await box.run(["/no/such/program"], timeout=60)
        engine.fail("exec", "Error response from daemon: container is not running")
        with pytest.raises(WorkspaceError, match="not running"):
            await box.run(["true"], timeout=60)

    workspace = DockerWorkspace(tmp_path / "boxes")
    in_box(workspace, use)
    engine.fail("start", "no space left on device")
    with pytest.raises(WorkspaceError, match="could be started: no space left"):
        in_box(workspace, nothing)
    assert engine.containers() == []


def test_an_engine_is_looked_for(
    engine: FakeDocker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = DockerWorkspace(tmp_path / "boxes")
    asyncio.run(workspace.check())
    engine.fail("version", "Cannot connect to the Docker daemon at unix:///var/run/docker.sock")
    with pytest.raises(EngineUnavailable, match="no engine: Cannot connect"):
        asyncio.run(workspace.check())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineUnavailable, match="workspace: bwrap"):
        asyncio.run(workspace.check())
