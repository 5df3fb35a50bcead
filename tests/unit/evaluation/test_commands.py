"""Which command runs a task's tests."""

import dataclasses

import pytest

from spider_worker.evaluation.commands import suite_command
from spider_worker.swe_tasks.base import Origin, Task
from spider_worker.swe_tasks.normalise import form_of, to_task

TASK = Task("i", "r", "p", Origin("dir", "/x"))


@pytest.mark.parametrize(
    ("given", "run"),
    [
        ("pytest -q tests", "pytest -q tests"),
        ("pytest --junitxml=x.xml -q", "pytest -q"),
        ("pytest --junit-xml x.xml && echo", "pytest && echo"),
        ("python -m unittest tests.test_a", "python -m unittest -v tests.test_a"),
        ("python -m unittest -v tests.test_a", "python -m unittest -v tests.test_a"),
        ("python -m unittest a --verbose", "python -m unittest a --verbose"),
        ("make check", "make check"),
    ],
)
def test_a_command_is_made_to_name_its_tests(given, run):
    assert suite_command(dataclasses.replace(TASK, test_cmd=given)) == run


PATCH = (
    "--- a/tests/a/test_x.py\n+++ b/tests/a/test_x.py\n@@ -1 +1 @@\n-x\n+y\n"
    "--- a/d.txt\n+++ b/d.txt\n@@ -1 +1 @@\n-x\n+y\n"
    "--- a/tests/gone/test_y.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n"
    "rename from tests/old/test_z.py\nrename to tests/b/test_z.py\n"
)
DJANGO = PATCH + (
    "--- /dev/null\n+++ b/tests/a/models.py\n@@ -0,0 +1 @@\n+x\n"
    "--- a/tests/c/tests.py\n+++ b/tests/c/tests.py\n@@ -1 +1 @@\n-x\n+y\n"
    "--- a/tests/d/tests/base.py\n+++ b/tests/d/tests/base.py\n@@ -1 +1 @@\n-x\n+y\n"
)
CASES = (
    "--- a/test-data/unit/check-x.test\n+++ b/test-data/unit/check-x.test\n@@ -1,2 +1,6 @@\n"
    " [case testOld]\n x\n+[case testNew]\n+y\n"
)
HERE = 'PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" '
LABELS = "a.test_x b.test_z c.tests d.tests.base"
ONE = {"fail_to_pass": ("t/x.py::a",)}


@pytest.mark.parametrize(
    ("changes", "run"),
    [
        (
            {"fail_to_pass": ("t/a b.py::x[1]", "t/c.py::y"), "pass_to_pass": ("t/c.py::z",)},
            "pytest 't/a b.py' t/c.py",
        ),
        (
            {"test_patch": PATCH, "fail_to_pass": ("test_x",)},
            "pytest tests/a/test_x.py tests/b/test_z.py",
        ),
        (
            {"repo": "django/django", "test_patch": DJANGO, "row": {"version": "3.0"}},
            f"{HERE}./tests/runtests.py --verbosity 2 --settings=test_sqlite --parallel 1 {LABELS}",
        ),
        (
            {"repo": "django/django", "test_patch": DJANGO, "row": {"version": "1.9"}},
            f"{HERE}./tests/runtests.py --verbosity 2 {LABELS}",
        ),
        (
            {"repo": "sympy/sympy", "test_patch": PATCH, "fail_to_pass": ("test_x",)},
            "PYTHONWARNINGS='ignore::UserWarning,ignore::SyntaxWarning'"
            " bin/test -C --verbose tests/a/test_x.py tests/b/test_z.py",
        ),
        (
            {"repo": "sphinx-doc/sphinx"} | ONE,
            "tox --current-env -epy39 -v -- $PYTEST_ADDOPTS t/x.py",
        ),
        ({"repo": "astropy/astropy"} | ONE, "pytest t/x.py"),
        ({"repo": "dask/dask"} | ONE, "pytest -n0 t/x.py"),
        ({"repo": "conan-io/conan"} | ONE, f"{HERE}pytest -n0 t/x.py"),
        (
            {"repo": "python/mypy", "test_patch": CASES} | ONE,
            "pytest -n0 -k 'testOld or testNew' t/x.py",
        ),
        ({"repo": "python/mypy", "test_patch": PATCH} | ONE, "pytest -n0 t/x.py"),
    ],
)
def test_without_a_command_the_data_sets_own_harness_is_followed(changes, run):
    assert suite_command(dataclasses.replace(TASK, **changes)) == run


ROW = {
    "instance_id": "a__b-1", "repo": "a/b", "patch": "p", "problem_statement": "s",
    "base_commit": "c", "test_patch": PATCH, "FAIL_TO_PASS": ["t/x.py::a"], "PASS_TO_PASS": [],
    "install_config": {"test_cmd": "pytest --no-header -rA --tb=line"},
}  # fmt: skip


def test_the_command_of_swe_rebench_lacks_the_files(tmp_path):
    command = "pytest --no-header -rA --tb=line"
    for row, run in (
        (ROW, f"{command} t/x.py"),
        (ROW | {"FAIL_TO_PASS": ["test_x"]}, f"{command} tests/a/test_x.py tests/b/test_z.py"),
        # A file of one's own that was made from such a row says it all.
        (ROW | {"repo_source": str(tmp_path), "test_cmd": "pytest -q"}, "pytest -q"),
    ):
        task = to_task(row, form=form_of(row))
        assert task is not None
        assert suite_command(task) == run
