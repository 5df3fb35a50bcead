"""The shell command that runs a task's tests, so that it names each of them.

Where a data set names no command, it is the one of the data set's own harness: that of SWE-bench
and that of SWE-Gym have one a repository, to which the files of the tests are added. SWE-rebench
names it in the row, and adds the files in the same way. What differs here is that a tree comes
first on the path of Django's and conan's Python: in their images a copy of the unchanged tree is
installed, or none, and those harnesses install again before each run of the tests.
"""

from __future__ import annotations

__all__ = ["suite_command"]

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Final

from spider_worker.evaluation.policy import named_files
from spider_worker.swe_tasks.base import Task

_TREE_FIRST: Final = 'PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" '
_DJANGO: Final = f"{_TREE_FIRST}./tests/runtests.py --verbosity 2"
#: The version that the harness leaves at its own settings.
_DJANGO_PLAIN: Final = "1.9"
_SYMPY: Final = "PYTHONWARNINGS='ignore::UserWarning,ignore::SyntaxWarning' bin/test -C --verbose"
#: What runs pytest where it is not plain ``pytest``. The plugin of tox that takes the present
#: environment wants its Python named; the variable stands for the options of the harness, which
#: tox may keep from what it starts. ``-n0`` takes back a number of processes that the repository's
#: own settings ask for.
_RUNNERS: Final[Mapping[str, str]] = {
    "sphinx-doc/sphinx": "tox --current-env -epy39 -v -- $PYTEST_ADDOPTS",
    "bokeh/bokeh": "pytest -n0",
    "conan-io/conan": f"{_TREE_FIRST}pytest -n0",
    "dask/dask": "pytest -n0",
    "getmoto/moto": "pytest -n0",
    "modin-project/modin": "pytest -n0",
    "python/mypy": "pytest -n0",
}
_UNITTEST: Final = re.compile(r"(\s-m\s+unittest)\b(?!.*\s(?:-v|--verbose)\b)")
_OWN_JUNIT: Final = re.compile(r"\s--junit-?xml(?:=|\s+)\S+")
#: The lines of a patch that name what a file was called before, or one that is gone.
_OLD_NAMES: Final = re.compile(r"^(?:--- |rename from |copy from ).*$", re.MULTILINE)
_CASE: Final = re.compile(r"\[case ([^\]]+)\]")


def suite_command(task: Task) -> str:
    if task.test_cmd is None:
        return _default(task)
    command = _UNITTEST.sub(r"\1 -v", _OWN_JUNIT.sub("", task.test_cmd))
    if "install_config" in task.row and "repo_source" not in task.row:  # SWE-rebench's
        return _with(command, _files(task))
    return command


def _default(task: Task) -> str:
    match task.repo:
        case "django/django":
            return _with(_django(task), map(_label, filter(_has_django_tests, _added(task))))
        case "sympy/sympy":
            return _with(_SYMPY, _added(task))
        case "python/mypy" if cases := dict.fromkeys(_CASE.findall(task.test_patch)):
            # Its cases are data, thousands in a file: those that the patch shows are meant.
            return _with(
                f"{_RUNNERS[task.repo]} -k {shlex.quote(' or '.join(cases))}", _files(task)
            )
        case repo:
            return _with(_RUNNERS.get(repo, "pytest"), _files(task))


def _with(command: str, names: Iterable[str]) -> str:
    return " ".join((command, *map(shlex.quote, names)))


def _files(task: Task) -> list[str]:
    """The files of the tests that judge the task: those of their ids, or of the test patch."""
    tests = (test for test in (*task.fail_to_pass, *task.pass_to_pass) if "::" in test)
    return list(dict.fromkeys(test.partition("::")[0] for test in tests)) or _added(task)


def _added(task: Task) -> list[str]:
    """The Python files that are there, changed or new, once the test patch is applied."""
    names = named_files(_OLD_NAMES.sub("", task.test_patch))
    return [name for name in names if name.endswith(".py")]


def _django(task: Task) -> str:
    if task.row.get("version") == _DJANGO_PLAIN:
        return _DJANGO
    return f"{_DJANGO} --settings=test_sqlite --parallel 1"


def _has_django_tests(name: str) -> bool:
    """Models and the like stand beside the tests, and a label that has none is no harm, but one
    that cannot be imported is."""
    path = PurePosixPath(name)
    below = path.parts[1:-1]
    return (
        path.name == "tests.py"
        or path.name.startswith("test_")
        or any(part == "tests" or part.startswith("test_") for part in below)
    )


def _label(name: str) -> str:
    return name.removeprefix("tests/").removesuffix(".py").replace("/", ".")
