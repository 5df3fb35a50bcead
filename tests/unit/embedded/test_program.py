from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spider_api.embedded.process import Program, StopStep
from spider_api.embedded.readiness import until
from spider_sdk.errors import ServerUnreachable


def program(tmp_path: Path, code: str, *steps: StopStep) -> Program:
    return Program(
        "child",
        [sys.executable, "-u", "-c", code],
        env=dict(os.environ),
        cwd=tmp_path,
        log=tmp_path / "child.log",
        steps=steps or (StopStep(signal.SIGTERM, 10),),
    )


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_runs_in_a_session_of_its_own_and_logs(tmp_path: Path) -> None:
    child = program(tmp_path, "import os; print(os.getsid(0)); import signal; signal.pause()")
    child.start()
    try:
        eventually(lambda: child.log_tail() != "")
        assert child.log_tail() == str(child.pid)  # so Ctrl-C on a terminal does not reach it
        assert child.running
        assert (tmp_path / "child.log").stat().st_mode & 0o777 == 0o600
    finally:
        child.stop()
    assert child.exit_code() == -signal.SIGTERM


def test_the_log_of_the_last_start_is_kept_beside(tmp_path: Path) -> None:
    for text in ("first", "second"):
        child = program(tmp_path, f"print({text!r})")
        child.start()
        eventually(lambda started=child: not started.running)
    assert (tmp_path / "child.log").read_text() == "second\n"
    assert (tmp_path / "child.log.1").read_text() == "first\n"


def test_one_that_ignores_every_word_is_killed_with_its_group(tmp_path: Path) -> None:
    code = (
        "import os, signal, subprocess, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()']).pid)\n"
        "signal.pause()"
    )
    child = program(tmp_path, code, StopStep(signal.SIGTERM, 0.2))
    child.start()
    eventually(lambda: child.log_tail() != "")
    grandchild = int(child.log_tail())
    child.stop()
    assert child.exit_code() == -signal.SIGKILL
    eventually(lambda: not alive(grandchild))


def test_steps_are_taken_in_order(tmp_path: Path) -> None:
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('warm'))\n"
        "signal.signal(signal.SIGQUIT, lambda *_: sys.exit('cold'))\n"
        "print('ready')\n"
        "while True: signal.pause()"
    )
    child = program(tmp_path, code, StopStep(signal.SIGTERM, 0.5), StopStep(signal.SIGQUIT, 10))
    child.start()
    eventually(lambda: "ready" in child.log_tail())
    child.stop()
    assert child.log_tail().split() == ["ready", "warm", "cold"]


PARENT = """
import os, signal, sys
from pathlib import Path
from spider_api.embedded.process import Program
code = "import signal; print('up'); signal.pause()"
child = Program("child", [sys.executable, "-u", "-c", code], env=dict(os.environ),
                cwd=Path.cwd(), log=Path(sys.argv[1]))
child.start()
print(child.pid, flush=True)
signal.pause()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs PR_SET_PDEATHSIG (Linux)")
def test_a_program_dies_with_its_killed_parent(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(log)], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        eventually(lambda: log.read_text() == "up\n")
        assert alive(child)
        parent.send_signal(signal.SIGKILL)
    eventually(lambda: not alive(child))


def test_waiting_for_a_program_that_ended_quotes_its_log(tmp_path: Path) -> None:
    child = program(tmp_path, "import sys; print('the reason'); sys.exit(3)")
    child.start()
    with pytest.raises(ServerUnreachable, match=r"child ended \(exit code 3\)(?s:.*)the reason"):
        until(lambda: False, [child], "the child", seconds=20)


def test_waiting_too_long_quotes_the_logs(tmp_path: Path) -> None:
    child = program(tmp_path, "import signal; print('still loading'); signal.pause()")
    child.start()
    try:
        eventually(lambda: child.log_tail() != "")
        with pytest.raises(ServerUnreachable, match=r"did not answer(?s:.*)still loading"):
            until(lambda: False, [child], "the child", seconds=0)
    finally:
        child.stop()
