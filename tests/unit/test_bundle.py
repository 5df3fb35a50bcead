"""Bundles: what is shipped runs by itself and answers as the function does at home."""

import asyncio
import functools
import importlib
import inspect
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.bundle import Bundle, bundle_function, bundle_reference, load_function
from spider_sdk.errors import UsageError

RUNS = """
import asyncio, inspect, json, sys, types
bundle, rows = json.load(sys.stdin)
module = types.ModuleType("spider_user_code")
sys.modules["spider_user_code"] = module
exec(compile(bundle["source"], "<bundle>", "exec"), module.__dict__)
answers = [getattr(module, bundle["name"])(row, **bundle["kwargs"]) for row in rows]
answers = [asyncio.run(one) if inspect.isawaitable(one) else one for one in answers]
print(json.dumps(answers))
"""


def answers(bundle: Bundle, rows: list[Any]) -> Any:
    """What the bundle answers in an interpreter that sees nothing of this one's."""
    run = subprocess.run(
        [sys.executable, "-I", "-c", RUNS],
        input=json.dumps([bundle, rows]),
        capture_output=True,
        text=True,
        env={},
        cwd="/",
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Write files of a project and import one of them."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(files: dict[str, str] | str, module: str = "processors") -> Any:
        files = {"processors.py": files} if isinstance(files, str) else files
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        return importlib.import_module(module)

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


EVERYTHING = '''
"""A module's docstring."""
from __future__ import annotations

import json as j, re
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
import functools
import operator
try:
    import no_such_module_anywhere as fast
except ImportError:
    fast = None

Words = list[str]
LIMIT = 2; OTHER = 3
PATTERN = re.compile(
    r"\\w+"
)
TABLE = {}
TABLE["é"] = "e"
STOP = set()
for word in ("the", "a"):
    STOP.add(word)
unused = open("/nonexistent") if False else None
REGISTRY = {}

def register(function):
    REGISTRY[function.__name__] = function
    return function

@register
def shout(text):
    return text.upper()

def logged(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)
    return wrapper

class Kind(Enum):
    SHORT = 1
    LONG = 2

class Base:
    @staticmethod
    def kind(words): return Kind.LONG if len(words) > LIMIT else Kind.SHORT

@dataclass
class Result(Base):
    words: Words
    counts: dict[str, int] = field(default_factory=dict)

def split(text: str) -> Words:
    words = PATTERN.findall(text)
    return [TABLE.get(word, word) for word in words if word not in STOP]

def recursive(number):
    return 0 if not number else 1 + recursive(number - 1)

@logged
def process(row, *, add=0):
    LOCAL = operator = 1
    result = Result(split(row["text"]))
    result.counts = Counter(result.words)
    return {"words": result.words, "kind": Base.kind(result.words).name,
            "json": j.dumps(result.counts, sort_keys=True), "fast": fast is None,
            "n": recursive(3) + add, "shout": REGISTRY["shout"]("x"), "local": LOCAL}

def never(row):
    raise SystemExit(undefined_name)

if __name__ == "__main__":
    process = None
'''


def test_everything_a_function_refers_to_travels(project: Callable[..., Any]) -> None:
    module = project(EVERYTHING)
    rows = [{"text": "the cat é a"}, {"text": "one two three"}]
    bundle = bundle_function(module.process, {"add": 4})
    assert answers(bundle, rows) == [module.process(row, add=4) for row in rows]
    assert bundle["name"] == "process"
    assert bundle["kwargs"] == {"add": 4}
    for absent in ("never", "operator\n", "OTHER", "/nonexistent", "docstring", "__main__"):
        assert absent not in bundle["source"]


def test_statements_keep_their_lines(project: Callable[..., Any]) -> None:
    module = project(EVERYTHING)
    source = bundle_function(module.process)["source"].split("\n")
    plain = textwrap.dedent(EVERYTHING).split("\n")
    for text in ("def split(text: str) -> Words:", "@logged", "    SHORT = 1", 'TABLE["é"] = "e"'):
        assert source.index(text) == plain.index(text)


@pytest.mark.parametrize(
    "text",
    [
        "async def f(row):\n    return await g(row)\nasync def g(row):\n    return row['x']\n",
        "def f(row, k=lambda: D):\n    return k()\nD = 5\n",
        "X: int = 4\nX += 1\ndef f(row):\n    return X\n",
        "count = 0\ndef f(row):\n    global count\n    count += 1\n    return count\n",
        "import os.path\ndef f(row):\n    return os.path.join('a', 'b')\n",
        "from math import *\ndef f(row):\n    return floor(1.5)\n",
        "if True:\n    def g(): return 1\nelse:\n    g = None\ndef f(row):\n    return g()\n",
        "def f(row):\n    import json\n    return [json.dumps(x) for x in [1] if (y := x)]\n",
        "class A:\n    x = 1\n    def m(self):\n        return __class__.x + len(N)\nN = [1]\n"
        "def f(row):\n    return A().m()\n",
        "def f(row: 'Nothing') -> Missing if False else None:\n    return 1\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from spider_sdk import Client\n"
        "def f(row: 'Client'):\n    return 1\n",
        "from functools import lru_cache\n@lru_cache\ndef g(x): return x * 2\n"
        "def f(row):\n    return g(2)\n",
        "a = 1; b = a + 1; c = 'not\\nwanted'\ndef f(row): return b; d = 3\n",
        "class Config:\n    pass\nConfig.size = 3\nconfig = Config()\nconfig.depth = 4\n"
        "def f(row):\n    return config.size + config.depth\n",
        "plugins = []\nclass Registry:\n    def add(self, g):\n        plugins.append(g())\n"
        "        return g\nregistry = Registry()\n@registry.add\ndef seven():\n    return 7\n"
        "def f(row):\n    registry\n    return plugins\n",
        "match 3:\n    case number:\n        pass\ndef f(row):\n    return number\n",
        "import sys\nclient = 5\ndef f(row):\n    client = 1\n    return client\n",
        "(x, [y, *z]) = 1, [2, 3]\ndef f(row):\n    return [x, y, z]\n",
    ],
)  # fmt: skip
def test_forms(project: Callable[..., Any], text: str) -> None:
    module = project(text)
    bundle = bundle_function(module.f)
    expected = module.f({"x": 1})
    if inspect.iscoroutine(expected):
        expected = asyncio.run(expected)
    assert answers(bundle, [{"x": 1}]) == [expected]


def test_a_local_name_does_not_pull_in_a_global_of_that_name(project: Callable[..., Any]) -> None:
    module = project("client = object()\ndef f(row):\n    client = 1\n    return client\n")
    assert "object" not in bundle_function(module.f)["source"]


def test_a_script_is_bundled_while_it_runs(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import json
            import sys
            from spider_sdk.bundle import bundle_function
            SUFFIX = "!"
            def pre(row):
                return row["q"] + SUFFIX
            with open(__file__) as client:
                json.dump(bundle_function(pre), sys.stdout)
            """
        )
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    bundle = json.loads(run.stdout)
    assert "spider_sdk" not in bundle["source"]
    assert answers(bundle, [{"q": "a"}]) == ["a!"]


PACKAGE = {
    "proj/__init__.py": "VERSION = 3\n",
    "proj/text/__init__.py": "from .clean import clean\n",
    "proj/text/clean.py": "import re\nfrom .. import VERSION\n\n"
    "def clean(text):\n    return re.sub('x', str(VERSION), text)\n",
    "proj/sub.py": "from helpers import twice\n",
    "proj/main.py": """
        from __future__ import annotations
        from .text import (
            clean,
        )
        from . import sub
        def f(row):
            from .text.clean import clean as again
            return [clean(row["t"]), sub.twice(2), again("x")]
        """,
    "helpers.py": "import json\n\ndef twice(x):\n    return json.loads(str(2 * x))\n",
}


def test_modules_of_the_project_travel(project: Callable[..., Any]) -> None:
    module = project(PACKAGE, "proj.main")
    bundle = bundle_function(module.f)
    assert answers(bundle, [{"t": "axb"}]) == [["a3b", 4, "3"]]
    lines = bundle["source"].split("\n")
    assert lines.index("def f(row):") == textwrap.dedent(PACKAGE["proj/main.py"]).split("\n").index(
        "def f(row):"
    )


def test_tracebacks_name_the_files_of_the_project(project: Callable[..., Any]) -> None:
    module = project(
        {
            "processors.py": "import helpers\ndef f(row):\n    return g(row)\n"
            "def g(row):\n    import traceback\n    try:\n        helpers.fail()\n"
            "    except ValueError:\n        return traceback.format_exc()\n",
            "helpers.py": "\n\ndef fail():\n    raise ValueError('here')\n",
        }
    )
    (text,) = answers(bundle_function(module.f), [{}])
    assert "File \"helpers.py\", line 4, in fail\n    raise ValueError('here')" in text


def refusal(function: Any, kwargs: Any = None) -> str:
    with pytest.raises(UsageError) as caught:
        bundle_function(function, kwargs)
    return str(caught.value)


class Holder:
    def method(self, row: Any) -> None: ...

    @staticmethod
    def static(row: Any) -> None: ...

    def __call__(self, row: Any) -> None: ...


def module_level(row: Any, size: int = 1) -> Any:
    return row


def generates(row: Any) -> Iterator[Any]:
    yield row


def test_what_is_no_function_of_a_module_is_refused_by_its_kind() -> None:
    outside = 3

    def inner(row: Any) -> int:
        return outside

    def free(row: Any) -> int:
        return 1

    assert "lambda" in refusal(lambda row: row)
    assert "uses its outside" in refusal(inner)
    assert "defined inside" in refusal(free)
    assert "kwargs" in refusal(functools.partial(module_level, size=2))
    assert "is a class" in refusal(Holder)
    assert "is a method" in refusal(Holder().method)
    assert "in the class Holder" in refusal(Holder.static)
    assert "built in" in refusal(len)
    assert "built in" in refusal(str.upper)
    assert "object of Holder" in refusal(Holder())
    assert "is no function" in refusal("text")
    assert "yields" in refusal(generates)


def test_a_function_without_a_file_is_refused() -> None:
    namespace: dict[str, Any] = {"__name__": "__console__"}
    exec("def f(row): return 1", namespace)
    assert "notebook or an interactive session" in refusal(namespace["f"])
    run = subprocess.run(
        [sys.executable, "-i", "-q"],
        input="from spider_sdk.bundle import bundle_function\ndef f(row): return 1\n\n"
        "bundle_function(f)\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert "notebook or an interactive session" in run.stderr


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"size": {1}}, "size is no JSON"),
        ({"size": float("nan")}, "size is no JSON"),
        ({"siz": 1}, "siz"),
        ({3: 1}, "3 is no name"),
    ],
)
def test_kwargs_are_json_and_fit(kwargs: Any, says: str) -> None:
    assert says in refusal(module_level, kwargs)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(row):\n    return nowhere\n", "nowhere is used but not defined"),
        ("def f(row):\n    return __file__\n", "__file__ is used"),
        (
            "W = [open(p).read() for p in ()]\ndef f(row):\n    return W\n",
            "processors.py:1: W is read",
        ),
        ("with open(__file__) as file:\n    W = 1\ndef f(row):\n    return W\n", "with statement"),
        ("if __name__ == '__main__':\n    W = 1\ndef f(row):\n    return W\n", "__main__"),
        (
            "from spider_sdk import errors\ndef f(row):\n    return errors\n",
            "spider_sdk is imported",
        ),
    ],
)
def test_what_a_worker_does_not_have_is_refused_by_name(
    project: Callable[..., Any], text: str, says: str
) -> None:
    assert says in refusal(project(text).f)


def test_a_local_extension_module_is_refused_by_name(
    project: Callable[..., Any], tmp_path: Path
) -> None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"native{suffix}").write_bytes(b"")
    module = project("def f(row):\n    import native\n")
    assert "local module native is no Python text" in refusal(module.f)


def test_a_reference_is_bundled_without_running_the_file(tmp_path: Path) -> None:
    (tmp_path / "helpers.py").write_text("def twice(x):\n    return 2 * x\n")
    path = tmp_path / "job.py"
    path.write_text("from helpers import twice\nraise SystemExit\ndef f(row): return twice(row)\n")
    assert answers(bundle_reference(f"{path}:f"), [4]) == [8]
    with pytest.raises(UsageError, match=r"job\.py defines no g"):
        bundle_reference(f"{path}:g")


def test_load_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "own_helpers.py").write_text("def twice(x):\n    return 2 * x\n")
    path = tmp_path / "json.py"  # a name that is taken
    path.write_text("from own_helpers import twice\ndef f(row):\n    return twice(row)\n")
    function = load_function(f"{path}:f")
    assert function(4) == 8
    assert answers(bundle_function(function), [4]) == [8]
    for reference, says in [
        (f"{path}:g", "no function g"),
        (f"{tmp_path}/none.py:f", "there is no file"),
        ("f", "expected path/to/file.py:function"),
        (f"{path}", "expected path/to/file.py:function"),
    ]:
        with pytest.raises(UsageError, match=says):
            load_function(reference)
    path.write_text("1 / 0\n")
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        load_function(f"{tmp_path / 'json.py'}:f")
