"""The judge on real repositories, in real boxes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import uuid
from pathlib import Path

import pytest

from spider_sdk.errors import EngineUnavailable, WorkspaceError
from spider_worker.evaluation.judge import GoldCheck, Judge
from spider_worker.evaluation.patches import METHODS
from spider_worker.swe_tasks.base import Origin, Task
from spider_worker.workspaces.local import LocalWorkspace
from tests.support.boxes import KINDS, alive, workspace
from tests.support.swe_repos import SweRepo, make_repos

TIMEOUT = 300.0  # seconds; far more than any run takes that does not hang

kinds = pytest.mark.parametrize("kind", KINDS)

NAMES = [
    "calc", "spaces", "unicode", "crlf", "binary", "nested", "deleted", "config", "hidden",
    "unittest", "script", "generated",
]  # fmt: skip


def task_of(repo: SweRepo, **changes: object) -> Task:
    task = Task(
        instance_id=repo.instance_id,
        repo=repo.repo,
        problem_statement=repo.problem_statement,
        origin=Origin("dir", str(repo.folder)),
        base_commit=repo.base_commit,
        bug_patch=repo.bug_patch,
        gold_patch=None if repo.bug_patch else repo.gold_patch,
        test_patch=repo.test_patch,
        fail_to_pass=repo.fail_to_pass,
        pass_to_pass=repo.pass_to_pass,
        test_cmd=repo.test_cmd,
        setup_cmds=repo.setup_cmds,
    )
    return dataclasses.replace(task, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SweRepo]:
    made = make_repos(tmp_path_factory.mktemp("repos"))
    return {repo.folder.name: repo for repo in made}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks' own checks, found out once for all tests."""
    return tmp_path_factory.mktemp("checks")


def patch_of(repo: SweRepo, tmp_path: Path, files: dict[str, str | None]) -> str:
    """The patch of an agent that makes these edits (None: it deletes the file)."""
    folder = tmp_path / "agent"
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}

    def git(*arguments: str, stdin: str = "") -> str:
        done = subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=b", *arguments],
            cwd=folder, env=env, check=True, capture_output=True, input=stdin.encode(),
        )  # fmt: skip
        return done.stdout.decode()

    subprocess.run(["git", "clone", "-q", repo.folder, folder], env=env, check=True)
    git("checkout", "-q", repo.base_commit)
    if repo.bug_patch:
        git("apply", "--index", stdin=repo.bug_patch)
        git("commit", "-qm", "x")
    for name, content in files.items():
        path = folder / name
        if content is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    git("add", "-A", "-f")
    return git("diff", "--cached", "--binary", "HEAD")


def judge(kind: str, tmp_path: Path, task: Task, patch: str | None, **options: object):
    place = workspace(kind, tmp_path / "boxes")
    report = asyncio.run(Judge(place, **({"timeout": TIMEOUT} | options)).judge(task, patch))
    boxes = tmp_path / "boxes"
    assert not boxes.exists() or list(boxes.iterdir()) == []
    return report


@pytest.mark.parametrize("name", NAMES)
def test_a_task_proves_itself(name, repos, tmp_path, cache):
    """Its solution passes, and the state without it does not."""
    judge = Judge(workspace("bwrap", tmp_path / "boxes"), timeout=TIMEOUT, cache=cache)
    assert asyncio.run(judge.check(task_of(repos[name]))) == GoldCheck(True)


@kinds
@pytest.mark.parametrize("name", ["calc", "hidden", "unittest"])
def test_the_solution_resolves(kind, name, repos, tmp_path, cache):
    report = judge(kind, tmp_path, task_of(repos[name]), repos[name].gold_patch, cache=cache)
    assert report.resolved is True, report
    assert (report.apply_method, report.restored, report.flaky) == (METHODS[0], (), ())
    assert set(report.fail_to_pass.passed) == set(repos[name].fail_to_pass)
    assert set(report.pass_to_pass.passed) == set(repos[name].pass_to_pass)


WRONG = "def total(values):\n    return sum(values)\n\n\ndef mean(values):\n    return 1.5\n"
HIDE = "import pytest\ndef pytest_collection_modifyitems(items):\n    items.clear()\n"
SKIP = (
    "import pytest\n@pytest.hookimpl(hookwrapper=True)\n"
    "def pytest_runtest_makereport(item, call):\n"
    "    outcome = yield\n    outcome.get_result().outcome = 'passed'\n"
)
BROKEN = "def total(values):\n    return sum(values)\n\n\ndef mean(values):\n    return sum(value\n"
BUGGY = WRONG.replace("1.5", "total(values) // len(values)")
FORGED = '<testsuite><testcase classname="tests.test_calc" name="{}"/></testsuite>'
# Code under test that puts its own junit file over the runner's when the process ends.
FORGER = (
    BUGGY
    + """

import atexit, os, sys
def forge():
    for word in [*sys.argv, *os.environ.get("PYTEST_ADDOPTS", "").split()]:
        if word.startswith("--junitxml="):
            with open(word.partition("=")[2], "w") as file:
                file.write('<testsuites>')
                for name in ("test_total", "test_mean_of_one", "test_mean[values0-1.5]",
                             "test_mean[values1-3]"):
                    file.write(f'<testcase classname="tests.test_calc" name="{name}"/>')
                file.write('</testsuites>')
atexit.register(forge)
"""
)

CHEATS = {
    "a wrong answer": {"calc.py": WRONG},
    "a syntax error": {"calc.py": BROKEN},
    "a conftest that makes all pass": {"conftest.py": SKIP},
    "a conftest that hides the tests": {"tests/conftest.py": HIDE},
    "a configuration that skips them": {"pytest.ini": "[pytest]\naddopts = -k total\n"},
    "a pyproject that skips them": {
        "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '-k total'\n"
    },
    "tests that were deleted": {"tests/test_calc.py": None},
    "tests that were weakened": {"tests/test_calc.py": "def test_mean():\n    pass\n"},
    "a runner of its own": {"pytest.py": "raise SystemExit(0)\n"},
    "a junit file in the tree": {"junit.xml": FORGED.format("test_mean[values0-1.5]")},
    "a junit file over the runner's": {"calc.py": FORGER},
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_does_not_resolve(cheat, repos, tmp_path, cache):
    repo = repos["calc"]
    patch = patch_of(repo, tmp_path, CHEATS[cheat])
    report = judge("bwrap", tmp_path, task_of(repo), patch, cache=cache, reruns=0)
    assert report.resolved is False, report
    assert repo.fail_to_pass[0] in report.fail_to_pass.failed or report.pass_to_pass.failed


def test_a_script_to_reproduce_the_fault_spoils_nothing(repos, tmp_path, cache):
    repo = repos["calc"]
    solved = BUGGY.replace("//", "/")
    script = "import sys\nsys.exit('this is no module')\n"
    patch = patch_of(repo, tmp_path, {"calc.py": solved, "test_repro.py": script})
    report = judge("bwrap", tmp_path, task_of(repo), patch, cache=cache)
    assert (report.resolved, report.restored) == (True, ("test_repro.py",))


class TrustingJudge(Judge):
    """Takes a task for valid: a short timeout is for the patch alone."""

    async def check(self, task: Task) -> GoldCheck:
        return GoldCheck(True)


@kinds
def test_a_patch_that_hangs_is_not_resolved_and_gone(kind, repos, tmp_path):
    marker = f"sleep-{uuid.uuid4().hex}"
    slow = f"import subprocess\nsubprocess.run(['sh', '-c', 'sleep 1000; : {marker}'])\n"
    patch = patch_of(repos["calc"], tmp_path, {"calc.py": slow})
    judge = TrustingJudge(workspace(kind, tmp_path / "boxes"), timeout=3.0, reruns=2)
    report = asyncio.run(judge.judge(task_of(repos["calc"]), patch))
    assert (report.resolved, report.test_timeout, report.error_eval) == (False, True, False)
    assert report.runs == 2, "a run past its time has one more chance, not two"
    assert alive(marker) == []
    assert list((tmp_path / "boxes").iterdir()) == []


def test_a_patch_that_fits_only_roughly_resolves(repos, tmp_path, cache):
    repo = repos["calc"]
    patch = (
        "--- a/calc.py\n+++ b/calc.py\n@@ -4,3 +4,3 @@\n a line that is not there\n"
        " def mean(values):\n-    return total(values) // len(values)\n"
        "+    return total(values) / len(values)\n"
    )
    report = judge("bwrap", tmp_path, task_of(repo), patch, cache=cache)
    assert (report.resolved, report.apply_method) == (True, METHODS[2])


def test_a_patch_that_does_not_fit_is_not_resolved(repos, tmp_path, cache):
    patch = "--- a/calc.py\n+++ b/calc.py\n@@ -1 +1 @@\n-nothing like it\n+x\n"
    report = judge("bwrap", tmp_path, task_of(repos["calc"]), patch, cache=cache)
    assert (report.resolved, report.failed_apply_patch, report.runs) == (False, True, 0)
    assert report.apply_method is None
    assert "calc.py" in report.error


def test_an_empty_patch_needs_no_box(repos, tmp_path):
    for patch in (None, "", " \n"):
        report = judge("local", tmp_path, task_of(repos["calc"]), patch)
        assert (report.resolved, report.empty_generation, report.runs) == (False, True, 0)
    assert not (tmp_path / "boxes").exists()


COUNTER = """
import os
def often():
    # Another answer each time, kept outside of the box: only the test's own host can do this.
    path = {path!r}
    with open(path, "a") as file:
        file.write("x")
    return os.path.getsize(path)
"""


def flaky_task(repos: dict[str, SweRepo], tmp_path: Path) -> tuple[SweRepo, Task, str]:
    """A patch that is right, and fails in its first run."""
    repo = repos["calc"]
    solved = BUGGY.replace("//", "/") + COUNTER.format(path=str(tmp_path / "count"))
    solved += "if often() == 1:\n    mean = total\n"
    return repo, task_of(repo), patch_of(repo, tmp_path, {"calc.py": solved})


def test_a_failure_that_does_not_come_again_is_flaky(repos, tmp_path, cache):
    _, task, patch = flaky_task(repos, tmp_path)
    report = judge("local", tmp_path, task, patch, cache=cache, reruns=2)
    assert (report.resolved, report.runs) == (True, 2)
    assert set(report.flaky) == {
        "tests/test_calc.py::test_mean[values0-1.5]", "tests/test_calc.py::test_mean[values1-3]",
    }  # fmt: skip


def test_without_reruns_it_is_just_a_failure(repos, tmp_path, cache):
    _, task, patch = flaky_task(repos, tmp_path)
    report = judge("local", tmp_path, task, patch, cache=cache, reruns=0)
    assert (report.resolved, report.runs, report.flaky) == (False, 1, ())


def test_a_failure_that_stays_is_not_flaky(repos, tmp_path, cache):
    repo = repos["calc"]
    patch = patch_of(repo, tmp_path, {"calc.py": WRONG})
    report = judge("local", tmp_path, task_of(repo), patch, cache=cache, reruns=2)
    assert (report.resolved, report.runs, report.flaky) == (False, 3, ())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fail_to_pass": ()}, "FAIL_TO_PASS"),
        ({"fail_to_pass": ("tests/test_calc.py::test_total",)}, "passes without a solution"),
        ({"pass_to_pass": ("tests/test_calc.py::test_absent",)}, "test_absent failed"),
        ({"gold_patch": "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n"}, "does not apply"),
        ({"gold_patch": "\n"}, "no solution of its own"),
        ({"test_patch": "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n"}, "own tests do not fit"),
    ],
)
def test_a_task_that_proves_nothing_is_invalid(changes, reason, repos, tmp_path):
    task = task_of(repos["calc"], **changes)
    report = judge("local", tmp_path, task, repos["calc"].gold_patch, reruns=0)
    assert (report.resolved, report.invalid_task, report.error_eval) == (None, True, False)
    assert reason in report.error
    assert report.settled


def test_a_task_that_proves_nothing_may_do_so_another_time(repos, tmp_path):
    repo, kept, tool = repos["calc"], tmp_path / "kept", tmp_path / "tool"
    task = task_of(repo, test_cmd=f"test -f {tool} || rm calc.py; {repo.test_cmd}")
    options = {"reruns": 0, "cache": kept}
    assert judge("local", tmp_path, task, repo.gold_patch, **options).invalid_task
    assert not kept.exists()
    tool.touch()
    assert judge("local", tmp_path, task, repo.gold_patch, **options).resolved is True
    (file,) = kept.iterdir()
    known = json.loads(file.read_text())
    file.write_text(json.dumps({**known, "valid": False, "reason": "an older one"}))
    assert judge("local", tmp_path, task, repo.gold_patch, **options).resolved is True
    # What is kept wrongly as good is found out where everything is to be looked at again.
    tool.unlink()
    assert judge("local", tmp_path, task, "x", **options).failed_apply_patch
    assert judge("local", tmp_path, task, "x", fresh=True, **options).invalid_task


def test_a_solution_that_ran_past_its_time_says_nothing_of_the_task(repos, tmp_path):
    repo = repos["calc"]
    task = task_of(repo, test_cmd="sleep 60")
    place = workspace("local", tmp_path / "boxes")
    found = asyncio.run(Judge(place, timeout=0.2, reruns=0).judge(task, repo.gold_patch))
    assert (found.resolved, found.error_eval, found.invalid_task) == (None, True, False)
    assert "ran past their time" in (found.error or "")


def test_where_no_test_runs_there_is_no_answer_and_nothing_is_kept(repos, tmp_path):
    task = task_of(repos["calc"], test_cmd="true")
    kept = tmp_path / "kept"
    report = judge("local", tmp_path, task, repos["calc"].gold_patch, reruns=0, cache=kept)
    assert (report.resolved, report.error_eval, report.settled) == (None, True, False)
    assert "no test has run" in report.error
    assert not kept.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"base_commit": "0" * 40},
        {"origin": Origin("dir", "/nonexistent/repository")},
        {"setup_cmds": ("echo broken; exit 3",)},
    ],
)
def test_a_box_that_cannot_be_had_says_nothing_of_the_patch(changes, repos, tmp_path):
    task = task_of(repos["calc"], **changes)
    report = judge("local", tmp_path, task, repos["calc"].gold_patch)
    assert (report.resolved, report.error_eval, report.invalid_task) == (None, True, False)
    assert report.error


def test_no_place_at_all_ends_the_evaluation(repos, tmp_path):
    judge = Judge(LocalWorkspace(tmp_path / "boxes", allowed=False))
    with pytest.raises(EngineUnavailable):
        asyncio.run(judge.judge(task_of(repos["calc"]), repos["calc"].gold_patch))


class Counting:
    """A workspace that counts its boxes, and may refuse them from one on."""

    kind = "local"

    def __init__(self, tmp_path: Path, *, refuse_from: int = 1000) -> None:
        self._place = workspace("local", tmp_path / "boxes")
        self._refuse_from = refuse_from
        self.opened = 0

    async def check(self) -> None:
        await self._place.check()

    def open(self, task: Task):
        self.opened += 1
        if self.opened >= self._refuse_from:
            raise WorkspaceError("no more boxes")
        return self._place.open(task)


class CountingJudge(Judge):
    """Finds every task valid, and counts how often it had to."""

    found_out = 0

    async def _find_out(self, task: Task) -> GoldCheck:
        type(self).found_out += 1
        await asyncio.sleep(0)  # others may ask meanwhile
        return GoldCheck(True)


def test_a_task_is_checked_once_for_all_its_patches_and_once_for_all_runs(
    repos, tmp_path, monkeypatch
):
    monkeypatch.setattr(CountingJudge, "found_out", 0)
    task, kept = task_of(repos["calc"]), tmp_path / "kept"

    def check(one: Task, times: int = 1, **options: float) -> int:
        judge = CountingJudge(workspace("local", tmp_path), cache=kept, **options)  # type: ignore[arg-type]

        async def ask() -> None:
            checks = await asyncio.gather(*(judge.check(one) for _ in range(times)))
            assert set(checks) == {GoldCheck(True)}

        asyncio.run(ask())
        return CountingJudge.found_out

    assert check(task, times=3) == 1
    assert check(task) == 1
    (file,) = kept.iterdir()
    file.write_text("{")
    assert check(task) == 2, "what cannot be read is found out anew"
    assert check(dataclasses.replace(task, pass_to_pass=())) == 3, "another task"
    assert check(task, timeout=1.0) == 4, "other conditions"
    assert check(dataclasses.replace(task, row={"any": "thing"})) == 4, "nothing that matters"


def test_a_folder_taken_as_it_stands_is_checked_in_every_run(repos, tmp_path):
    task = task_of(repos["hidden"], base_commit=None, test_patch="", gold_patch=None)
    kept = tmp_path / "kept"
    judge("local", tmp_path, task, "x", cache=kept)
    assert not kept.exists()


def test_a_box_that_fails_in_a_rerun_does_not_undo_what_is_known(repos, tmp_path, cache):
    repo = repos["calc"]
    place = Counting(tmp_path, refuse_from=2)
    patch = patch_of(repo, tmp_path, {"calc.py": WRONG})
    report = asyncio.run(Judge(place, cache=cache, timeout=TIMEOUT).judge(task_of(repo), patch))
    assert (report.resolved, report.runs) == (False, 1)
