"""Patches judged in containers, as far as a ``docker`` without an engine has them: tasks in the
forms of the public sets, in images that are made as theirs are."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from spider_worker.evaluation.evaluate import evaluate_file
from spider_worker.swe_tasks.base import Task
from spider_worker.swe_tasks.normalise import form_of, image_of, to_task
from spider_worker.workspaces.docker import DockerWorkspace
from tests.support.fake_docker import FakeDocker, running_engine
from tests.support.trajectories import record

Files = Mapping[str, str]
ENV = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDocker]:
    with running_engine(tmp_path, monkeypatch) as fake:
        yield fake


def git(folder: Path, *arguments: str) -> str:
    named = ["git", "-c", "user.name=a", "-c", "user.email=b", *arguments]
    done = subprocess.run(named, cwd=folder, env=ENV, check=True, capture_output=True)
    return done.stdout.decode()


def write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@dataclasses.dataclass
class Case:
    """A task whose image has ``files``; patches are to be made of further states. ``judged`` are
    the reports, by what the patch was called."""

    engine: FakeDocker
    tmp_path: Path
    files: Files
    repo: str = "tests/small"
    instance_id: str = "tests__small-1"

    def __post_init__(self) -> None:
        self.tree = self.engine.image(image_of(self.instance_id))
        write(self.tree, self.files)
        git(self.tree, "init", "-q")
        git(self.tree, "add", "-A")
        git(self.tree, "commit", "-qm", "Start")
        self.engine.give_testbed(self.tree)
        self.environment = self.tree.parent / "opt/miniconda3/envs/testbed"

    def patch(self, files: Files) -> str:
        folder = self.tmp_path / "edited"
        subprocess.run(["git", "clone", "-q", self.tree, folder], env=ENV, check=True)
        write(folder, files)
        git(folder, "add", "-A")
        said = git(folder, "diff", "--cached", "HEAD")
        subprocess.run(["rm", "-rf", folder], check=True)
        return said

    def task(self, gold: Files, tests: Files, fail_to_pass: list[str], **more: Any) -> Task:
        """A row of SWE-bench's."""
        row = {
            "instance_id": self.instance_id,
            "repo": self.repo,
            "base_commit": "0" * 40,
            "patch": self.patch(gold),
            "test_patch": self.patch(tests) if tests else "",
            "problem_statement": "It is wrong.",
            "environment_setup_commit": "0" * 40,
            "version": "1.0",
            "FAIL_TO_PASS": json.dumps(fail_to_pass),
            "PASS_TO_PASS": "[]",
            **more,
        }
        task = to_task(row, form=form_of(row))
        assert task is not None
        return task

    def judge(self, task: Task, patches: Mapping[str, str]) -> dict[str, Any]:
        """The reports of an output.jsonl with a run for each patch."""
        file = self.tmp_path / "output.jsonl"
        lines = [
            record(task.instance_id, git_patch=patch, n=n, status="finished")
            for n, patch in enumerate(patches.values())
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        workspace = DockerWorkspace(self.tmp_path / "boxes")
        tasks = {task.instance_id: task}
        asyncio.run(evaluate_file(file, tasks, workspace, reruns=0, timeout=300.0))
        assert not self.engine.containers()
        assert not list((self.tmp_path / "boxes").iterdir())
        written = [json.loads(line) for line in file.read_text().splitlines()]
        assert [one["resolved"] for one in written] == [
            one["report"]["resolved"] for one in written
        ]
        return {name: one["report"] for name, one in zip(patches, written, strict=True)}


WHERE = (
    "import os, sys\n\ndef test_where():\n"
    "    assert sys.prefix == '/opt/miniconda3/envs/testbed'\n"
    "    assert os.environ['CONDA_DEFAULT_ENV'] == 'testbed'\n"
    "    assert os.getcwd() == '/testbed'\n\n"
)
SIMPLE = {"mod.py": "def double(x):\n    return x\n", "tests/test_mod.py": WHERE}
RIGHT = {"mod.py": "def double(x):\n    return 2 * x\n"}
TESTS = {
    "tests/test_mod.py": "from mod import double\n" + WHERE + "def test_double():\n"
    "    assert double(2) == 4\n"
}
WANTED = ["tests/test_mod.py::test_double", "tests/test_mod.py::test_where"]


def test_a_task_of_swe_bench_is_judged_with_the_python_of_its_image(
    engine: FakeDocker, tmp_path: Path
) -> None:
    case = Case(engine, tmp_path, SIMPLE | {"tests/__init__.py": ""})
    task = case.task(RIGHT, TESTS, WANTED)
    assert task.test_cmd is None
    reports = case.judge(
        task,
        {
            "right": case.patch(RIGHT),
            "wrong": case.patch({"mod.py": "def double(x):\n    return 3 * x\n"}),
            "of the tests": case.patch({"tests/test_mod.py": "def test_double():\n    pass\n"}),
            "misfit": "--- a/mod.py\n+++ b/mod.py\n@@ -1 +1 @@\n-nothing like it\n+x\n",
            "empty": "",
        },
    )
    assert {name: one["resolved"] for name, one in reports.items()} == {
        "right": True, "wrong": False, "of the tests": False, "misfit": False, "empty": False,
    }, reports  # fmt: skip
    assert reports["of the tests"]["restored"] == ["tests/test_mod.py"]
    assert reports["misfit"]["failed_apply_patch"]
    assert {call[call.index("--network") + 1] for call in engine.calls("create")} == {"none"}


def test_a_task_of_swe_smith_is_judged(engine: FakeDocker, tmp_path: Path) -> None:
    good = SIMPLE | RIGHT | TESTS | {"tests/__init__.py": ""}
    case = Case(engine, tmp_path, good, instance_id="small__mod.1")
    bug = case.patch({"mod.py": SIMPLE["mod.py"]})
    row = {
        "instance_id": "small__mod.1", "repo": "swesmith/small__mod", "patch": bug,
        "problem_statement": "It is wrong.", "image_name": image_of("small__mod.1"),
        "FAIL_TO_PASS": WANTED[:1], "PASS_TO_PASS": WANTED[1:],
    }  # fmt: skip
    task = to_task(row, form=form_of(row))
    assert task is not None
    write(case.tree, {"mod.py": SIMPLE["mod.py"]})
    right = git(case.tree, "diff", "-R")
    git(case.tree, "checkout", "-q", ".")
    reports = case.judge(task, {"right": right, "idle": right.replace("2 * x", "x * x * x")})
    assert (reports["right"]["resolved"], reports["idle"]["resolved"]) == (True, False), reports


def test_an_image_that_cannot_be_had_says_nothing_of_the_patch(
    engine: FakeDocker, tmp_path: Path
) -> None:
    case = Case(engine, tmp_path, SIMPLE)
    task = case.task(RIGHT, TESTS, WANTED)
    (case.tree.parent).rename(tmp_path / "away")
    (tmp_path / "boxes").mkdir()
    report = case.judge(task, {"right": task.gold_patch or ""})["right"]
    assert (report["resolved"], report["error_eval"]) == (None, True)
    assert "cannot be pulled" in report["error"]


def test_tox_may_keep_the_harnesss_options_from_sphinxs_tests(
    engine: FakeDocker, tmp_path: Path
) -> None:
    case = Case(engine, tmp_path, SIMPLE | {"tests/__init__.py": ""}, repo="sphinx-doc/sphinx")
    tox = case.environment / "bin" / "tox"
    tox.write_text(
        '#!/bin/bash\n[ "$1 $2 $3 $4" = "--current-env -epy39 -v --" ] || exit 9\n'
        'shift 4\nunset PYTEST_ADDOPTS\nexec python -m pytest "$@"\n'
    )
    tox.chmod(0o755)
    report = case.judge(case.task(RIGHT, TESTS, WANTED), {"right": case.patch(RIGHT)})["right"]
    assert report["resolved"] is True, report


RUNTESTS = """\
#!/usr/bin/env python
import sys, unittest
assert sys.argv[1:6] == ["--verbosity", "2", "--settings=test_sqlite", "--parallel", "1"], sys.argv
suite = unittest.defaultTestLoader.loadTestsFromNames(sys.argv[6:])
ended = unittest.TextTestRunner(verbosity=2).run(suite)
sys.exit(not ended.wasSuccessful())
"""
DJANGO_TESTS = """\
from unittest import TestCase
from django.mod import double

class DoubleTests(TestCase):
    def test_double(self):
        self.assertEqual(double(2), 4)
"""


def test_django_is_tested_in_its_tree_and_not_as_it_is_installed(
    engine: FakeDocker, tmp_path: Path
) -> None:
    old = {"django/__init__.py": "", "django/mod.py": SIMPLE["mod.py"]}
    case = Case(
        engine,
        tmp_path,
        old | {"tests/runtests.py": RUNTESTS, "tests/basic/__init__.py": ""},
        repo="django/django",
    )
    (case.tree / "tests/runtests.py").chmod(0o755)
    git(case.tree, "commit", "-qam", "Run it")
    write(next(case.environment.glob("lib/python*/site-packages")), old)
    right = {"django/mod.py": RIGHT["mod.py"]}
    tests = {"tests/basic/tests.py": DJANGO_TESTS, "tests/basic/models.py": "raise SystemExit\n"}
    task = case.task(right, tests, ["test_double (basic.tests.DoubleTests)"])
    report = case.judge(task, {"right": case.patch(right)})["right"]
    assert report["resolved"] is True, report


SETUP = """\
import pathlib, sys
assert sys.argv[1:] == ["build_ext", "--inplace"]
source = pathlib.Path("fast.pyx").read_text()
compile(source, "fast.pyx", "exec")
pathlib.Path("fast.py").write_text(source)
"""


def test_what_is_compiled_is_built_again_where_a_patch_changes_it(
    engine: FakeDocker, tmp_path: Path
) -> None:
    case = Case(
        engine,
        tmp_path,
        {
            "fast.pyx": SIMPLE["mod.py"],
            "setup.py": SETUP,
            ".gitignore": "fast.py\n",
            "tests/__init__.py": "",
            "tests/test_mod.py": WHERE,
        },
    )
    write(case.tree, {"fast.py": SIMPLE["mod.py"]})  # as it was built for the image
    right = {"fast.pyx": RIGHT["mod.py"]}
    tests = {"tests/test_mod.py": TESTS["tests/test_mod.py"].replace("from mod", "from fast")}
    reports = case.judge(
        case.task(right, tests, WANTED),
        {
            "right": case.patch(right),
            "broken": case.patch({"fast.pyx": "def double(x:\n"}),
        },
    )
    assert reports["right"]["resolved"] is True, reports
    # It cannot be built, so the tests ran on what there was.
    assert reports["broken"]["resolved"] is False
    assert reports["broken"]["tests"]["fail_to_pass"]["failed"] == WANTED[:1]
