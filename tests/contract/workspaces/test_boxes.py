"""What every box must do, in each kind that needs no engine."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from spider_sdk.errors import EngineUnavailable, WorkspaceError
from spider_worker.swe_tasks.base import Origin, Task
from spider_worker.workspaces import bwrap
from spider_worker.workspaces.base import Box, Finished
from spider_worker.workspaces.bwrap import BwrapWorkspace, bwrap_arguments, bwrap_environment
from spider_worker.workspaces.interpreter import interpreter_roots
from spider_worker.workspaces.local import LocalWorkspace
from spider_worker.workspaces.pids import can_bound
from spider_worker.workspaces.process import Output
from tests.support.boxes import KINDS, alive, bare_task, workspace

kinds = pytest.mark.parametrize("kind", KINDS)

# Forks twice, each time with a session of its own, and lets go of every file.
ESCAPE = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        open("away", "w").close()
        os.closerange(0, 64)
        time.sleep(600)
    os._exit(0)
while not os.path.exists("away"):
    time.sleep(0.01)
if sys.argv[2] == "stay":
    time.sleep(600)
"""


# No more than a host can bear: nothing may hold it back.
BOMB = """
import os, time
for _ in range(400):
    if os.fork() == 0:
        time.sleep(600)
"""


def in_box(
    kind: str, tmp_path: Path, use: Callable[[Box], Awaitable[object]], task: Task | None = None
) -> None:
    async def run() -> None:
        place = workspace(kind, tmp_path / "boxes")
        await place.check()
        async with place.open(task or bare_task(tmp_path / "origin")) as box:
            await use(box)
        assert list((tmp_path / "boxes").iterdir()) == []

    asyncio.run(run())


async def shell(box: Box, line: str, **options: object) -> Finished:
    return await box.run(["sh", "-c", line], **({"timeout": 60.0} | options))  # type: ignore[arg-type]


@kinds
def test_a_command_starts_in_the_tree_with_an_environment_of_its_own(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    async def use(box: Box) -> None:
        done = await shell(box, "cat a.txt; pwd; env; ls -A ~; git log --format=%s", env={"X": "y"})
        assert done.ok
        assert done.text.startswith(f"one\n{box.path}\n")
        assert done.text.endswith("Start\n"), "the origin's history is there"
        names = {line.partition("=")[0] for line in done.text.splitlines() if "=" in line}
        assert names - {"PWD", "OLDPWD", "SHLVL", "_"} == {
            "PATH", "HOME", "LANG", "TZ", "USER", "X",
        }  # fmt: skip

    in_box(kind, tmp_path, use)


@kinds
def test_the_workers_python_is_the_first_on_the_path(kind: str, tmp_path: Path) -> None:
    async def use(box: Box) -> None:
        done = await box.run(["python", "-c", "import sys, pytest; print(sys.prefix)"], timeout=60)
        assert done.text == f"{sys.prefix}\n"

    in_box(kind, tmp_path, use)


@kinds
def test_status_output_and_input_are_passed_on(kind: str, tmp_path: Path) -> None:
    async def use(box: Box) -> None:
        done = await shell(box, "cat; echo wrong >&2; exit 7", stdin=b"\0\xff in\n")
        assert (done.code, done.output) == (7, b"\0\xff in\nwrong\n")
        assert (await shell(box, "kill -9 $$")).code == 128 + 9
        # A program that does not read what it is given is no error.
        assert (await shell(box, "exec <&-", stdin=b"x" * (1 << 20))).code == 0

    in_box(kind, tmp_path, use)


@kinds
@pytest.mark.parametrize("how", ["ends", "stay"])
def test_no_process_is_left_behind(kind: str, how: str, tmp_path: Path) -> None:
    marker = uuid.uuid4().hex

    async def use(box: Box) -> None:
        done = await box.run(
            ["python", "-c", ESCAPE, marker, how], timeout=60 if how == "ends" else 3
        )
        assert done.code == (0 if how == "ends" else None), done.text
        assert await box.read("away") == b""
        assert alive(marker) == []

    in_box(kind, tmp_path, use)


@kinds
@pytest.mark.parametrize("times", [1, 2])
def test_cancelling_kills_before_it_returns(kind: str, times: int, tmp_path: Path) -> None:
    marker = uuid.uuid4().hex

    async def use(box: Box) -> None:
        running = asyncio.create_task(
            box.run(["python", "-c", ESCAPE, marker, "stay"], timeout=600)
        )
        while await box.read("away") is None:  # noqa: ASYNC110 - a file of another process
            await asyncio.sleep(0.01)
        assert alive(marker)
        for _ in range(times):
            running.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await running
        assert alive(marker) == []

    in_box(kind, tmp_path, use)


@kinds
def test_what_a_dead_worker_had_started_ends(kind: str, tmp_path: Path) -> None:
    """The worker is killed, so nothing of it can clean up: the warden has to."""
    bare_task(tmp_path / "origin")
    marker = uuid.uuid4().hex
    worker = f"""
import asyncio, os, signal
from pathlib import Path
from spider_worker.swe_tasks.base import Origin, Task
from tests.support.boxes import workspace
async def main():
    task = Task("i", "r", "p", Origin("dir", {str(tmp_path / "origin")!r}))
    async with workspace({kind!r}, Path({str(tmp_path / "boxes")!r})).open(task) as box:
        asyncio.create_task(box.run(["python", "-c", {ESCAPE!r}, {marker!r}, "stay"], timeout=600))
        while await box.read("away") is None:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", worker], cwd=root, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    deadline = 3000
    while alive(marker) and deadline:
        deadline -= 1
        subprocess.run(["sleep", "0.01"], check=True)
    assert alive(marker) == []


@kinds
def test_a_long_output_keeps_its_ends(kind: str, tmp_path: Path) -> None:
    async def use(box: Box) -> None:
        done = await shell(box, "echo first; head -c 9000000 /dev/zero | tr '\\0' x; echo last")
        assert done.cut
        assert done.output.startswith(b"first\n")
        assert done.output.endswith(b"xlast\n")
        assert len(done.output) < 3 << 20

    in_box(kind, tmp_path, use)


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize("length", [0, 9, 10, 11, 100])
def test_output_is_bounded_whatever_its_pieces(piece: int, length: int) -> None:
    data = bytes(range(length))
    output = Output(10)
    for start in range(0, length, piece):
        output.add(data[start : start + piece])
    assert output.value().startswith(data[:5])
    assert output.value().endswith(data[-5:] if length else b"")
    assert output.cut == (length > 10)
    assert length > 10 or output.value() == data


@kinds
def test_a_command_that_is_not_there_is_an_error_of_the_workspace(
    kind: str, tmp_path: Path
) -> None:
    async def use(box: Box) -> None:
        with pytest.raises(WorkspaceError, match="No such file"):
            await box.run(["/no/such/program"], timeout=60)
        # One that merely sounds like it is none.
        done = await shell(box, "echo bwrap: no; exit 1")
        assert (done.code, done.text) == (1, "bwrap: no\n")

    in_box(kind, tmp_path, use)


@kinds
def test_files_are_put_and_read_without_following_links(kind: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the host's")

    async def use(box: Box) -> None:
        await box.put("new folder/ü.sh", b"\0data", executable=True)
        assert await box.read("new folder/ü.sh") == b"\0data"
        assert await box.read("new folder/ü.sh", limit=2) == b"\0d"
        assert await box.read("not there") is None
        assert await box.read("nor/this") is None
        made = f"ln -s {secret} file; ln -s {tmp_path} folder; mkfifo pipe; test -x new*/*.sh"
        assert (await shell(box, made)).ok
        for name in ("file", "folder/secret", "pipe", "../secret", str(secret), ""):
            with pytest.raises(WorkspaceError):
                await box.read(name)
        for name in ("folder/new", "../new", str(tmp_path / "new"), "a.txt/x"):
            with pytest.raises(WorkspaceError):
                await box.put(name, b"x")
        await box.put("file", b"mine")
        assert await box.read("file") == b"mine"

    in_box(kind, tmp_path, use)
    assert secret.read_text() == "the host's"
    assert not (tmp_path / "new").exists()


@kinds
def test_an_origin_that_cannot_be_had_is_said(kind: str, tmp_path: Path) -> None:
    task = bare_task(tmp_path / "origin")
    for origin, commit, said in (
        (Origin("dir", str(tmp_path / "none")), None, "no repository at"),
        (task.origin, "a" * 40, "has no commit aaaa"),
        (task.origin, "--upload-pack=x", "is no commit"),
        (Origin("image", "some/image:latest"), None, "kind docker"),
    ):
        broken = Task("i-2", "r", "p", origin, base_commit=commit)
        with pytest.raises(WorkspaceError, match=said):
            in_box(kind, tmp_path / str(commit) / origin.kind / said[:3], _nothing, broken)
        assert not list(tmp_path.rglob("boxes/*"))


async def _nothing(box: Box) -> None:
    raise AssertionError("there is no box")


@kinds
def test_a_tree_with_closed_folders_is_removed(kind: str, tmp_path: Path) -> None:
    async def use(box: Box) -> None:
        assert (await shell(box, "mkdir -p x/y; touch x/y/z; chmod 000 x/y; chmod 500 x")).ok

    in_box(kind, tmp_path, use)


def test_local_boxes_need_the_operators_word(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="SPIDER_ALLOW_LOCAL_WORKSPACE=true"):
        asyncio.run(LocalWorkspace(tmp_path, allowed=False).check())


def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineUnavailable, match="needs bwrap"):
        asyncio.run(BwrapWorkspace(tmp_path).check())
    with pytest.raises(EngineUnavailable, match="needs git"):
        asyncio.run(LocalWorkspace(tmp_path, allowed=True).check())


def test_a_bubblewrap_that_may_not_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace'\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    with pytest.raises(EngineUnavailable, match=r"No permissions.*user namespaces"):
        asyncio.run(BwrapWorkspace(tmp_path / "boxes").check())
    assert list((tmp_path / "boxes").iterdir()) == []


# -- what bubblewrap keeps apart ---------------------------------------------------------------


def test_the_host_is_out_of_sight_and_reach(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the host's")

    async def use(box: Box) -> None:
        assert box.path == "/testbed"
        for path in (secret, "/etc/shadow", Path.home() / ".ssh", Path(__file__), "/sys", "/run"):
            assert not (await shell(box, f"test -e '{path}'")).ok, path
        for path in ("/x", "/usr/x", "/etc/x", "/home/x", f"{sys.prefix}/x", "/proc/sys/kernel/x"):
            assert not (await shell(box, f"touch '{path}'")).ok, path
        for path in ("/testbed/x", "/tmp/x", "/dev/shm/x", "~/x"):
            assert (await shell(box, f"touch {path}")).ok, path
        # In memory, and gone with the command.
        assert not (await shell(box, "test -e /tmp/x || test -e ~/x")).ok
        assert (await shell(box, "test -e /testbed/x && id -un")).text == "agent\n"

    in_box("bwrap", tmp_path, use)


def test_the_kernels_settings_cannot_be_written(tmp_path: Path) -> None:
    """The kernel grants root's user the writing of these without any capability."""

    async def use(box: Box) -> None:
        found = await shell(
            box, "find /proc/sys /proc/fs /proc/acpi /proc/mtrr -type f -writable 2>/dev/null"
        )
        assert found.text == ""
        path = "/proc/sys/kernel/core_pattern"
        assert not (await shell(box, f"v=$(cat {path}); echo $v > {path}")).ok
        # Nor by a fresh /proc in namespaces of one's own.
        assert not (await shell(box, "unshare -Urpf --mount-proc true")).ok

    in_box("bwrap", tmp_path, use)


def test_processes_and_the_network_of_the_host_are_apart(tmp_path: Path) -> None:
    async def use(box: Box) -> None:
        pids = await shell(box, "ls /proc | grep -c '^[0-9]'")
        assert int(pids.text) < 8
        devices = await shell(box, "tail -n +3 /proc/net/dev | cut -d: -f1")
        assert devices.text.split() == ["lo"]
        assert not (await shell(box, f"kill -0 {os.getpid()}")).ok
        code = "import socket; socket.create_connection(('127.0.0.1', {}), 5)"
        server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            connect = ["python", "-c", code.format(port)]
            assert not (await box.run(connect, timeout=60)).ok
            assert (await box.run(connect, timeout=60, network=True)).ok

    in_box("bwrap", tmp_path, use)


def test_a_fork_bomb_stays_in_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_bound():
        pytest.skip("no control group of process numbers may be made here")
    monkeypatch.setattr(bwrap, "PIDS", 120)
    marker = uuid.uuid4().hex

    async def use(box: Box) -> None:
        done = await box.run(["python", "-c", BOMB, marker], timeout=60)
        assert done.code == 1
        assert done.text.endswith("Resource temporarily unavailable\n")
        assert alive(marker) == []
        assert (await shell(box, "echo over")).text == "over\n"

    in_box("bwrap", tmp_path, use)


def test_a_process_of_ones_own_can_be_started_in_a_box(tmp_path: Path) -> None:
    """What an agent is started with: more to see, and a folder to write to."""
    task = bare_task(tmp_path / "origin")
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown" / "x").write_text("seen")
    (tmp_path / "out").mkdir()

    async def use() -> None:
        async with BwrapWorkspace(tmp_path / "boxes").open(task) as box:
            prefix = bwrap_arguments(
                box.folder,
                roots=interpreter_roots(sys.executable),
                read_only=[(str(tmp_path / "shown"), "/opt/shown")],
                writable=[(str(tmp_path / "out"), "/opt/out")],
            )
            line = "cp /opt/shown/x /opt/out/y && ! touch /opt/shown/y && cat a.txt"
            done = subprocess.run(  # noqa: ASYNC221 - nothing else is going on
                [*prefix, "sh", "-c", line],
                env=bwrap_environment(sys.executable), capture_output=True,
            )  # fmt: skip
            assert (done.returncode, done.stdout) == (0, b"one\n")
            assert (tmp_path / "out" / "y").read_text() == "seen"

    asyncio.run(use())
