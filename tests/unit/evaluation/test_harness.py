"""How a task's tests are run, and what comes back where they do not play fair."""

import asyncio
import os
import subprocess

import pytest

from spider_worker.evaluation.harness import run_suite
from spider_worker.evaluation.statuses import Status
from spider_worker.swe_tasks.base import Origin, Task
from spider_worker.workspaces.local import LocalWorkspace


@pytest.fixture
def suite(tmp_path):
    """Run a command on a tree with one file of tests, in a real box."""

    def go(command, text="def test_a():\n    pass\n", *, timeout=300.0):
        origin = tmp_path / "origin"
        origin.mkdir()
        (origin / "test_x.py").write_text(text)
        env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
        for arguments in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "x")):
            subprocess.run(
                ["git", "-c", "user.name=a", "-c", "user.email=b", *arguments],
                cwd=origin, env=env, check=True,
            )  # fmt: skip
        task = Task("i", "r", "p", Origin("dir", str(origin)), test_cmd=command)

        async def use():
            async with LocalWorkspace(tmp_path / "boxes", allowed=True).open(task) as box:
                run = await run_suite(box, task, timeout=timeout)
                assert list(box.vault.iterdir()) == []
                return run

        return asyncio.run(use())

    return go


def test_what_the_tests_see_is_the_same_everywhere(suite, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    monkeypatch.setenv("SECRET", "x")
    run = suite(
        "python -m pytest",
        "import os, time\n\ndef test_a():\n    assert os.environ['PYTHONHASHSEED'] == '0'\n"
        "    assert time.tzname[0] == 'UTC' and os.environ['LC_ALL'] == 'C.UTF-8'\n"
        "    assert 'SECRET' not in os.environ\n\ndef test_b():\n    print('seen')\n",
    )
    assert run.results.status_of("test_x.py::test_a") is Status.PASSED
    assert (run.exit_code, run.fault, run.results.count) == (0, None, 2)
    assert "seen" in run.log


def test_options_of_the_repository_do_not_hide_the_results(suite):
    run = suite("python -m pytest -q --no-summary --color=yes --tb=no")
    assert run.results.status_of("test_x.py::test_a") is Status.PASSED


def test_a_log_of_any_length_comes_back_by_its_end(suite):
    run = suite(
        "python -m pytest -s",
        "import sys\n\ndef test_a():\n    for _ in range(6):\n        print('x' * (1 << 20))\n"
        "    print('\\udcff'.encode('utf-8', 'surrogateescape'))\n",
    )
    assert run.results.status_of("test_x.py::test_a") is Status.PASSED
    assert run.log.rstrip().endswith("=")


@pytest.mark.parametrize(
    ("command", "code"),
    [("true", 0), ("exit 3", 3), ("no-such-program", 127), ("python -m pytest absent.py", 4)],
)
def test_no_test_is_no_result(suite, command, code):
    run = suite(command)
    assert (run.exit_code, run.fault) == (code, "no test has run")


def test_code_that_ends_the_runner_leaves_no_result(suite):
    text = "import os\nos.write(1, b'PASSED test_x.py::test_a\\n')\nos._exit(0)\n"
    run = suite("python -m pytest -s", text)
    assert run.fault == "no test has run"
    assert run.results.status_of("test_x.py::test_a") is None


JUNIT = """
import os
word = next(w for w in os.environ["PYTEST_ADDOPTS"].split() if w.startswith("--junitxml="))
path = word.partition("=")[2]
"""


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("os.symlink('/etc/passwd', path)\n", "no test has run"),
        ("os.mkfifo(path)\n", "no test has run"),
        ("open(path, 'w').write('<!DOCTYPE a [<!ENTITY b \"c\">]><a>&b;</a>')\n", "document type"),
        ("open(path, 'w').write('<testsuite>')\n", "cannot be read"),
    ],
)
def test_a_junit_file_that_is_none_is_not_read(suite, text, fault):
    run = suite("python test_x.py", JUNIT + text)
    assert fault in run.fault
    assert run.results.count == 0


def test_a_runner_that_is_killed_with_its_shell_leaves_no_result(suite):
    run = suite("kill -9 $PPID; sleep 100")
    assert "did not come back whole" in run.fault


def test_tests_past_their_time_are_ended(suite):
    run = suite("sleep 1000", timeout=2.0)
    assert (run.timed_out, run.exit_code, run.results.count) == (True, None, 0)


def test_what_tests_leave_running_does_not_hold_them_up(suite):
    run = suite("sleep 1000 & python -m pytest")
    assert run.results.status_of("test_x.py::test_a") is Status.PASSED
