"""A dozen small software tasks: real git repositories with a history, a fault and its tests.

Each is made as the public sets are: a good state with tests that pass, a patch that breaks it (as
SWE-smith has it) or a base commit that is broken already and a patch that mends it (as SWE-bench
has it). ``answer-<name>`` stands in what mends the fault and in the repository's history, and
nowhere in the tree that an agent is to see.
"""

from __future__ import annotations

__all__ = ["SweRepo", "make_repos", "write_jsonl"]

import dataclasses
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Files = Mapping[str, str | bytes | None]

PYTEST = "python -m pytest -q -p no:cacheprovider"
UNITTEST = "python -m unittest -v"

_ENV = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "An Author",
    "GIT_AUTHOR_EMAIL": "author@example.org",
    "GIT_COMMITTER_NAME": "An Author",
    "GIT_COMMITTER_EMAIL": "author@example.org",
    "GIT_AUTHOR_DATE": "2024-05-06T07:08:09+0000",
    "GIT_COMMITTER_DATE": "2024-05-06T07:08:09+0000",
}


@dataclasses.dataclass(frozen=True)
class SweRepo:
    """One task. ``bug_patch`` "": the base commit is broken. ``gold_patch`` mends the broken state
    in both forms. ``marker`` is in the answer and in the history, never in the broken tree."""

    instance_id: str
    repo: str
    folder: Path
    bundle: Path
    base_commit: str
    problem_statement: str
    bug_patch: str
    gold_patch: str
    test_patch: str
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...]
    test_cmd: str
    setup_cmds: tuple[str, ...]
    marker: str

    def row(self, *, source: str = "dir") -> dict[str, Any]:
        """A line of the offline format; ``source`` is ``dir`` or ``bundle``."""
        row: dict[str, Any] = {
            "instance_id": self.instance_id,
            "repo": self.repo,
            "image_name": None,
            "patch": self.bug_patch,
            "FAIL_TO_PASS": list(self.fail_to_pass),
            "PASS_TO_PASS": list(self.pass_to_pass),
            "problem_statement": self.problem_statement,
            "repo_source": str(self.bundle if source == "bundle" else self.folder),
            "base_commit": self.base_commit,
            "test_cmd": self.test_cmd,
        }
        if not self.bug_patch:
            row["gold_patch"] = self.gold_patch
        if self.test_patch:
            row["test_patch"] = self.test_patch
        if self.setup_cmds:
            row["setup_cmds"] = list(self.setup_cmds)
        return row


@dataclasses.dataclass(frozen=True)
class _Plan:
    name: str
    problem: str
    good: Files
    bug: Files  # what differs in the broken state; None: the file is not there
    fails: Sequence[str]
    passes: Sequence[str]
    hidden_tests: Files = dataclasses.field(default_factory=dict)
    broken_base: bool = False
    test_cmd: str = PYTEST
    setup: Sequence[str] = ()
    packed: bool = False


def make_repos(folder: Path) -> list[SweRepo]:
    """Make all of them under ``folder``: ``<name>`` and ``<name>.bundle`` each."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_make(plan, folder) for plan in _PLANS]


def write_jsonl(path: Path, repos: Sequence[SweRepo], *, source: str | None = None) -> Path:
    """The offline data set. ``source`` None: folders and bundles in turn."""
    with path.open("w", encoding="utf-8") as file:
        for number, repo in enumerate(repos):
            kind = source or ("dir", "bundle")[number % 2]
            file.write(json.dumps(repo.row(source=kind), ensure_ascii=False) + "\n")
    return path


def _make(plan: _Plan, parent: Path) -> SweRepo:
    folder, bundle = parent / plan.name, parent / f"{plan.name}.bundle"
    folder.mkdir()
    marker = f"answer-{plan.name}"
    _git(folder, "init", "-q", "-b", "main")
    _write(folder, {"README.md": f"# {plan.name}\n"})
    _commit(folder, "Start")
    _write(folder, plan.good)
    good = _commit(folder, f"Get it right ({marker})")
    if plan.broken_base:
        _write(folder, plan.bug)
        base = _commit(folder, "Rework it")
        _write(folder, {name: plan.good[name] for name in plan.bug})
        gold = _difference(folder)
        _write(folder, plan.hidden_tests)
        _commit(folder, f"Mend it and test that ({marker})")
        tests = _git(folder, "diff", "--binary", good, "HEAD", "--", *plan.hidden_tests)
        bug = ""
    else:
        _write(folder, {"CHANGES.txt": "One change.\n"})
        base = _commit(folder, "Keep a list of changes")
        _write(folder, plan.bug)
        bug = _difference(folder)
        gold = _git(folder, "diff", "--binary", "--cached", "-R", "HEAD")
        _git(folder, "reset", "-q", "--hard")
        tests = ""
        if plan.hidden_tests:
            _write(folder, plan.hidden_tests)
            tests = _difference(folder)
            _git(folder, "reset", "-q", "--hard")
    _git(folder, "tag", "-a", "v1", "-m", f"Tagged ({marker})", good)
    _git(folder, "branch", "other", good)
    if plan.packed:
        _git(folder, "gc", "-q", "--aggressive")
    _git(folder, "bundle", "create", "-q", str(bundle), "--all")
    return SweRepo(
        instance_id=f"tests__{plan.name}.{base[:8]}",
        repo=f"tests/{plan.name}",
        folder=folder,
        bundle=bundle,
        base_commit=base,
        problem_statement=plan.problem,
        bug_patch=bug,
        gold_patch=gold,
        test_patch=tests,
        fail_to_pass=tuple(plan.fails),
        pass_to_pass=tuple(plan.passes),
        test_cmd=plan.test_cmd,
        setup_cmds=tuple(plan.setup),
        marker=marker,
    )


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-c", "core.autocrlf=false", *arguments],
        cwd=folder, env=_ENV, capture_output=True, check=True,
    )  # fmt: skip
    return done.stdout.decode()


def _commit(folder: Path, message: str) -> str:
    _git(folder, "add", "-A")
    _git(folder, "commit", "-q", "-m", message)
    return _git(folder, "rev-parse", "HEAD").strip()


def _difference(folder: Path) -> str:
    _git(folder, "add", "-A")
    return _git(folder, "diff", "--binary", "--cached", "HEAD")


def _write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        path = folder / name
        if content is None:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        if path.suffix == ".sh":
            path.chmod(0o755)


_PLANS = (
    _Plan(
        name="calc",
        problem="mean([1, 2]) gives 1 instead of 1.5.",
        good={
            "calc.py": (
                "def total(values):\n    return sum(values)\n\n\n"
                "def mean(values):\n    # answer-calc\n    return total(values) / len(values)\n"
            ),
            "tests/test_calc.py": (
                "import pytest\nfrom calc import mean, total\n\n\n"
                "def test_total():\n    assert total([1, 2]) == 3\n\n\n"
                "def test_mean_of_one():\n    assert mean([4]) == 4\n\n\n"
                "@pytest.mark.parametrize('values, wanted', [([1, 2], 1.5), ([2, 4], 3)])\n"
                "def test_mean(values, wanted):\n    assert mean(values) == wanted\n"
            ),
        },
        bug={
            "calc.py": (
                "def total(values):\n    return sum(values)\n\n\n"
                "def mean(values):\n    return total(values) // len(values)\n"
            ),
        },
        fails=["tests/test_calc.py::test_mean[values0-1.5]"],
        passes=[
            "tests/test_calc.py::test_total",
            "tests/test_calc.py::test_mean_of_one",
            "tests/test_calc.py::test_mean[values1-3]",
        ],
        packed=True,
    ),
    _Plan(
        name="spaces",
        problem="The word 'the' is counted although it is a stop word.",
        good={
            "words.py": (
                "from pathlib import Path\n\n"
                "STOP = (Path(__file__).parent / 'word lists' / 'stop words.txt').read_text()\n\n\n"
                "def count(text):\n    stop = set(STOP.split())\n"
                "    return len([word for word in text.split() if word not in stop])\n"
            ),
            "word lists/stop words.txt": "a\nthe\nanswer-spaces\nof\n",
            "tests/test_words.py": (
                "from words import count\n\n\n"
                "def test_plain():\n    assert count('red green') == 2\n\n\n"
                "def test_article():\n    assert count('the red') == 1\n"
            ),
        },
        bug={"word lists/stop words.txt": "a\nof\n"},
        fails=["tests/test_words.py::test_article"],
        passes=["tests/test_words.py::test_plain"],
    ),
    _Plan(
        name="unicode",
        problem="Die Begrüßung auf Griechisch ist falsch: γειά statt γεια.",
        good={
            "grüße.py": (
                "# answer-unicode\n"
                "GREETINGS = {'de': 'Grüß Gott', 'el': 'γεια', 'ja': '今日は'}\n"
            ),
            "tests/test_greetings.py": (
                "import importlib\n\nimport pytest\n\n"
                "GREETINGS = importlib.import_module('grüße').GREETINGS\n\n\n"
                "def test_el():\n    assert GREETINGS['el'] == 'γεια'\n\n\n"
                "@pytest.mark.parametrize('language', ['de', 'ja'])\n"
                "def test_there(language):\n    assert GREETINGS[language]\n"
            ),
        },
        bug={"grüße.py": "GREETINGS = {'de': 'Grüß Gott', 'el': 'γειά', 'ja': '今日は'}\n"},
        fails=["tests/test_greetings.py::test_el"],
        passes=[
            "tests/test_greetings.py::test_there[de]",
            "tests/test_greetings.py::test_there[ja]",
        ],
    ),
    _Plan(
        name="crlf",
        problem="double(2) is 5.",
        good={
            "double.py": "# answer-crlf\r\ndef double(x):\r\n    return 2 * x\r\n",
            "tests/test_double.py": (
                "from double import double\r\n\r\n\r\n"
                "def test_double():\r\n    assert double(2) == 4\r\n\r\n\r\n"
                "def test_minus():\r\n    assert double(-1) == -2 + double(0) * 2\r\n"
            ),
        },
        bug={"double.py": "def double(x):\r\n    return 2 * x + (x > 0)\r\n"},
        fails=["tests/test_double.py::test_double"],
        passes=["tests/test_double.py::test_minus"],
    ),
    _Plan(
        name="binary",
        problem="The table ends too early: lookup(3) raises IndexError.",
        good={
            "lookup.py": (
                "from pathlib import Path\n\n"
                "TABLE = (Path(__file__).parent / 'table.bin').read_bytes()\n\n\n"
                "def lookup(place):\n    return TABLE[place]\n"
            ),
            "table.bin": bytes([0, 255, 10, 13]) + b"answer-binary\0",
            "tests/test_lookup.py": (
                "from lookup import lookup\n\n\n"
                "def test_first():\n    assert lookup(0) == 0\n\n\n"
                "def test_last():\n    assert lookup(3) == 13\n"
            ),
        },
        bug={"table.bin": bytes([0, 255, 10])},
        fails=["tests/test_lookup.py::test_last"],
        passes=["tests/test_lookup.py::test_first"],
    ),
    _Plan(
        name="nested",
        problem="Depth of an empty list is given as 0.",
        good={
            "shapes/__init__.py": "",
            "shapes/lists/__init__.py": "from shapes.lists.measures.depth import depth\n",
            "shapes/lists/measures/__init__.py": "",
            "shapes/lists/measures/depth.py": (
                "def depth(value):\n    if not isinstance(value, list):\n        return 0\n"
                "    # answer-nested\n    return 1 + max(map(depth, value), default=0)\n"
            ),
            "tests/__init__.py": "",
            "tests/lists/__init__.py": "",
            "tests/lists/test_depth.py": (
                "from shapes.lists import depth\n\n\nclass TestDepth:\n"
                "    def test_leaf(self):\n        assert depth(1) == 0\n\n"
                "    def test_empty(self):\n        assert depth([]) == 1\n\n"
                "    def test_deep(self):\n        assert depth([[1], 2]) == 2\n"
            ),
        },
        bug={
            "shapes/lists/measures/depth.py": (
                "def depth(value):\n    if not isinstance(value, list) or not value:\n"
                "        return 0\n    return 1 + max(map(depth, value))\n"
            ),
        },
        fails=["tests/lists/test_depth.py::TestDepth::test_empty"],
        passes=[
            "tests/lists/test_depth.py::TestDepth::test_leaf",
            "tests/lists/test_depth.py::TestDepth::test_deep",
        ],
    ),
    _Plan(
        name="deleted",
        problem="There is no reader for csv any more.",
        good={
            "readers/__init__.py": (
                "import importlib\n\n\ndef reader(kind):\n"
                "    return importlib.import_module(f'readers.{kind}').read\n"
            ),
            "readers/text.py": "def read(line):\n    return [line]\n",
            "readers/csv.py": "# answer-deleted\ndef read(line):\n    return line.split(',')\n",
            "tests/test_readers.py": (
                "from readers import reader\n\n\n"
                "def test_text():\n    assert reader('text')('a,b') == ['a,b']\n\n\n"
                "def test_csv():\n    assert reader('csv')('a,b') == ['a', 'b']\n"
            ),
        },
        bug={"readers/csv.py": None},
        fails=["tests/test_readers.py::test_csv"],
        passes=["tests/test_readers.py::test_text"],
    ),
    _Plan(
        name="config",
        problem="clamp(11, 0, 10) is 11.",
        good={
            "clamp.py": (
                "def clamp(value, low, high):\n    # answer-config\n"
                "    return max(low, min(value, high))\n"
            ),
            "conftest.py": (
                "import pytest\n\n\n@pytest.fixture()\ndef limits():\n    return (0, 10)\n"
            ),
            "setup.cfg": "[tool:pytest]\ntestpaths = checks\npython_files = check_*.py\n",
            "checks/check_clamp.py": (
                "from clamp import clamp\n\n\n"
                "def test_inside(limits):\n    assert clamp(5, *limits) == 5\n\n\n"
                "def test_low(limits):\n    assert clamp(-1, *limits) == 0\n\n\n"
                "def test_high(limits):\n    assert clamp(11, *limits) == 10\n"
            ),
        },
        bug={"clamp.py": "def clamp(value, low, high):\n    return max(low, value)\n"},
        fails=["checks/check_clamp.py::test_high"],
        passes=["checks/check_clamp.py::test_inside", "checks/check_clamp.py::test_low"],
    ),
    _Plan(
        name="hidden",
        problem="slug('A  B') has two dashes.",
        good={
            "slug.py": (
                "def slug(text):\n    # answer-hidden\n    return '-'.join(text.lower().split())\n"
            ),
            "tests/test_slug.py": (
                "from slug import slug\n\n\ndef test_lower():\n    assert slug('A B') == 'a-b'\n"
            ),
        },
        bug={"slug.py": "def slug(text):\n    return text.lower().replace(' ', '-')\n"},
        hidden_tests={
            "tests/test_slug.py": (
                "from slug import slug\n\n\n"
                "def test_lower():\n    assert slug('A B') == 'a-b'\n\n\n"
                "def test_two_spaces():  # answer-hidden\n    assert slug('A  B') == 'a-b'\n"
            ),
            "tests/test_more.py": (
                "from slug import slug\n\n\ndef test_empty():  # answer-hidden\n"
                "    assert slug('  ') == ''\n"
            ),
        },
        broken_base=True,
        fails=["tests/test_slug.py::test_two_spaces", "tests/test_more.py::test_empty"],
        passes=["tests/test_slug.py::test_lower"],
    ),
    _Plan(
        name="unittest",
        problem="pop() on an empty stack raises IndexError instead of giving None.",
        good={
            "stack.py": (
                "class Stack(list):\n    def take(self):\n        # answer-unittest\n"
                "        return self.pop() if self else None\n"
            ),
            "tests/__init__.py": "",
            "tests/test_stack.py": (
                "import unittest\n\nfrom stack import Stack\n\n\n"
                "class StackTest(unittest.TestCase):\n"
                "    def test_take(self):\n        self.assertEqual(Stack([1]).take(), 1)\n\n"
                "    def test_empty(self):\n        self.assertIsNone(Stack().take())\n"
            ),
        },
        bug={"stack.py": "class Stack(list):\n    def take(self):\n        return self.pop()\n"},
        fails=["test_empty (tests.test_stack.StackTest.test_empty)"],
        passes=["test_take (tests.test_stack.StackTest.test_take)"],
        test_cmd=UNITTEST,
    ),
    _Plan(
        name="script",
        problem="greet.sh greets nobody.",
        good={
            "greet.sh": '#!/bin/sh\n# answer-script\necho "hello $1"',  # no newline at the end
            "tests/test_greet.py": (
                "import os\nimport subprocess\n\n\n"
                "def test_runs():\n    assert os.access('greet.sh', os.X_OK)\n\n\n"
                "def test_name():\n"
                "    said = subprocess.run(['./greet.sh', 'Ada'], capture_output=True).stdout\n"
                "    assert said == b'hello Ada\\n'\n"
            ),
        },
        bug={"greet.sh": '#!/bin/sh\necho "hello"'},
        fails=["tests/test_greet.py::test_name"],
        passes=["tests/test_greet.py::test_runs"],
    ),
    _Plan(
        name="generated",
        problem="square(3) is 6.",
        good={
            ".gitignore": "*.json\n__pycache__/\n",
            "make_table.py": (
                "import json\n\n# answer-generated\n"
                "json.dump([n * n for n in range(5)], open('table.json', 'w'))\n"
            ),
            "squares.py": (
                "import json\n\n\n"
                "def square(n):\n    return json.load(open('table.json'))[n]\n"
            ),
            "tests/test_squares.py": (
                "import subprocess\nimport sys\n\nfrom squares import square\n\n\n"
                "def table():\n"
                "    subprocess.run([sys.executable, 'make_table.py'], check=True)\n\n\n"
                "def test_two():\n    table()\n    assert square(2) == 4\n\n\n"
                "def test_three():\n    table()\n    assert square(3) == 9\n"
            ),
        },
        bug={
            "make_table.py": (
                "import json\n\n"
                "json.dump([n + n for n in range(5)], open('table.json', 'w'))\n"
            ),
        },
        fails=["tests/test_squares.py::test_three"],
        passes=["tests/test_squares.py::test_two"],
        setup=["python make_table.py"],
    ),
)  # fmt: skip
