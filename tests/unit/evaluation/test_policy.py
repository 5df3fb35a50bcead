"""Which edits do not count."""

import pytest

from spider_worker.evaluation.policy import (
    judging_files,
    named_files,
    runner_sections,
    takes_back,
)
from spider_worker.swe_tasks.base import Origin, Task

JUDGING = frozenset({"tests/test_a.py"})


@pytest.mark.parametrize(
    "name",
    [
        "tests/test_a.py", "conftest.py", "a/b/conftest.py", "pytest.ini", "a/.pytest.ini",
        "pytest.toml", "tox.ini", "noxfile.py", "sitecustomize.py", "src/usercustomize.py",
        "x.pth", "evil.dist-info/entry_points.txt", "evil.egg-info/entry_points.txt",
    ],
)  # fmt: skip
@pytest.mark.parametrize("new", [True, False])
def test_edits_to_the_judge_are_taken_back(name, new):
    assert takes_back(name, new=new, judging=JUDGING)


@pytest.mark.parametrize(
    "name",
    [
        "test_repro.py", "tests/test_new.py", "a/b_test.py", "pytest.py", "pytest/__init__.py",
        "_pytest/junitxml.py", "unittest/__init__.py",
    ],
)  # fmt: skip
def test_only_new_files_are_taken_back_for_their_name(name):
    assert takes_back(name, new=True, judging=JUDGING)
    assert not takes_back(name, new=False, judging=JUDGING)


@pytest.mark.parametrize(
    "name",
    [
        "a.py", "src/testing.py", "tests/data.json", "tests/helpers.py", "setup.py", "setup.cfg",
        "pyproject.toml", "latest.py", "src/pytest_plugin.py", "test_data.txt", "src/unittest.py",
    ],
)  # fmt: skip
def test_all_else_counts(name):
    assert not takes_back(name, new=True, judging=JUDGING)


def test_the_files_of_the_tests_are_told_from_ids_and_test_patch():
    task = Task(
        "i", "r", "p", Origin("dir", "/x"),
        test_patch='--- a/t/old.py\n+++ b/t/new.py\n@@\n--- "a/gr\\303\\274n.py"\n+++ /dev/null\n',
        fail_to_pass=("tests/test_a.py::T::test_b[x]", "test_x (pkg.mod.Case)"),
        pass_to_pass=("test_bare",),
    )  # fmt: skip
    assert set(judging_files(task)) == {
        "t/old.py", "t/new.py", "grün.py", "tests/test_a.py",
        "pkg.py", "pkg/mod.py", "pkg/mod/Case.py",
    }  # fmt: skip


def test_names_of_renames_and_quotes_are_read():
    patch = (
        "diff --git a/x b/y\nrename from x\nrename to y\n"
        '--- "a/tab\\there"\n+++ "b/quote\\"d"\n--- a/with space\t\n+++ b/crlf.py\r\n'
    )
    assert named_files(patch) == ("x", "y", "tab\there", 'quote"d', "with space", "crlf.py")


PYPROJECT = b'[project]\nname = "%s"\n[tool.pytest.ini_options]\naddopts = "%s"\n'
SETUP = b"[metadata]\nname = %s\n[tool:pytest]\naddopts = %s\n"


@pytest.mark.parametrize(("name", "form"), [("a/pyproject.toml", PYPROJECT), ("setup.cfg", SETUP)])
def test_only_the_runners_sections_of_a_shared_file_matter(name, form):
    before = runner_sections(name, form % (b"x", b"-q"))
    assert before is not None
    assert before == runner_sections(name, form % (b"y", b"-q"))
    assert before != runner_sections(name, form % (b"x", b"-k nothing"))
    assert runner_sections(name, None) is None
    assert runner_sections(name, b"") is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pyproject.toml", b"[tool"),
        ("pyproject.toml", b"tool = 3"),
        ("pyproject.toml", b"a = " + b"[" * 100_000),
        ("pyproject.toml", b"\xff"),
        ("setup.cfg", b"no section"),
        ("setup.cfg", b"\xff"),
    ],
)
def test_a_shared_file_that_cannot_be_read_is_said(name, content):
    with pytest.raises(ValueError, match=name):
        runner_sections(name, content)
