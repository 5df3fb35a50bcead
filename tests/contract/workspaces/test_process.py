"""Commands on this host: one process starts them all, and each is watched over."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from spider_sdk.errors import WorkspaceError
from spider_worker.workspaces.process import run_command
from spider_worker.workspaces.spawner import spawner

ENV = {"PATH": os.environ["PATH"]}


def test_a_command_has_its_input_its_folder_its_environment_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THE_WORKER", "1")
    script = "pwd; cat; env; ls /proc/self/fd | wc -l; echo said >&2; exit 3"
    done = asyncio.run(
        run_command(
            ["sh", "-c", script],
            timeout=60.0,
            stdin="käse".encode(),
            env={**ENV, "MINE": "ü"},
            cwd=tmp_path,
        )
    )
    text = done.text
    assert done.code == 3
    assert text.startswith(f"{tmp_path}\nkäse")
    assert "MINE=ü" in text
    assert "OF_THE_WORKER" not in text
    assert "said" in text
    assert "\n4\n" in text  # the three streams, and the folder that ls reads


def test_descriptors_are_passed_on_under_their_numbers(tmp_path: Path) -> None:
    files = [(tmp_path / name).open("wb") for name in ("a", "b", "c", "d", "e", "f", "g", "h")]
    numbers = [file.fileno() for file in files]
    # Numbers that the warden has in use itself, in an order that would overwrite some of them.
    script = "; ".join(f"import os; os.write({number}, b'{number}')" for number in numbers)
    done = asyncio.run(
        run_command([sys.executable, "-c", script], timeout=60.0, env=ENV, pass_fds=numbers[::-1])
    )
    assert done.ok, done.text
    for file in files:
        file.close()
        assert Path(file.name).read_text() == str(numbers[files.index(file)])


def test_a_command_line_may_be_as_long_as_the_kernel_allows() -> None:
    words = ["x" * 100_000 for _ in range(10)]
    done = asyncio.run(run_command(["echo", *words], timeout=60.0, env=ENV))
    assert done.text == " ".join(words) + "\n"


@pytest.mark.parametrize(
    ("command", "cwd", "said"),
    [
        (["no-such-program"], None, "no-such-program: No such file"),
        (["true"], "/no/such/folder", "/no/such/folder: No such file"),
        (["echo", "a\0b"], None, "null byte"),
    ],
)
def test_what_cannot_be_started_is_said(command: list[str], cwd: str | None, said: str) -> None:
    with pytest.raises(WorkspaceError, match=said):
        asyncio.run(
            run_command(command, timeout=60.0, env=ENV, cwd=None if cwd is None else Path(cwd))
        )


def test_many_run_at_a_time_and_each_gets_its_own_end() -> None:
    async def main() -> list[int | None]:
        some = [
            run_command(["sh", "-c", f"read x; exit {number}"], timeout=60.0, env=ENV)
            for number in range(40)
        ]
        return [done.code for done in await asyncio.gather(*some)]

    assert asyncio.run(main()) == list(range(40))


def test_the_process_that_starts_commands_is_started_again_when_it_was_killed() -> None:
    asyncio.run(run_command(["true"], timeout=60.0, env=ENV))
    process = spawner()._process
    assert process is not None
    process.kill()
    process.wait()
    assert asyncio.run(run_command(["echo", "on"], timeout=60.0, env=ENV)).text == "on\n"


def test_commands_outlive_the_process_that_started_them(tmp_path: Path) -> None:
    """Only their wardens can lose them: it is no reason for a run to fail."""

    async def main() -> str:
        marker = tmp_path / "go"
        os.mkfifo(marker)
        running = asyncio.create_task(
            run_command(
                ["sh", "-c", f"touch {tmp_path}/here; read x < {marker}; echo on"],
                timeout=60.0,
                env=ENV,
            )
        )
        while not (tmp_path / "here").exists():  # noqa: ASYNC110 - a file of another process
            await asyncio.sleep(0.01)
        process = spawner()._process
        assert process is not None
        process.kill()
        process.wait()
        marker.write_text("go\n")
        return (await running).text

    assert asyncio.run(main()) == "on\n"


def test_a_lost_warden_is_an_error_and_not_an_end(tmp_path: Path) -> None:
    script = f"echo $PPID > {tmp_path}/pid; mv {tmp_path}/pid {tmp_path}/warden; sleep 9876.5"

    async def main() -> None:
        running = asyncio.create_task(run_command(["sh", "-c", script], timeout=60.0, env=ENV))
        while not (tmp_path / "warden").exists():  # noqa: ASYNC110 - a file of another process
            await asyncio.sleep(0.01)
        os.kill(int((tmp_path / "warden").read_text()), signal.SIGKILL)
        await running

    try:
        with pytest.raises(WorkspaceError, match="watches over"):
            asyncio.run(main())
    finally:
        for name in os.listdir("/proc"):
            if name.isdigit() and "9876.5" in _command_line(name):
                os.kill(int(name), signal.SIGKILL)


def _command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
