"""Which of a patch's edits do not count, because they change the tests and not what is tested.

``tests-1``, the only policy so far, takes back every edit to

- the files that hold the tests which judge the task, and those of the task's test patch;
- what configures the runner or is run by it or by the interpreter unasked: ``conftest.py``,
  ``pytest.ini``, ``pytest.toml``, ``tox.ini``, ``noxfile.py``, ``sitecustomize.py``,
  ``usercustomize.py``, ``*.pth``, the metadata of installed packages (entry points make plugins);
- ``setup.cfg`` and ``pyproject.toml``, where their sections for pytest or tox differ: the whole
  file, since a part of a patch is nobody's;

and every new file that the runner would collect by its name (``test_*.py``, ``*_test.py``) or that
stands in the place of the runner itself (``pytest.py``, ``unittest/`` …): an agent's script to
reproduce a fault is often called so, and ends a whole run of pytest if it cannot be imported.
All other files count, also those that the task's tests use, such as their data.
"""

from __future__ import annotations

__all__ = ["NAME", "SHARED", "judging_files", "named_files", "runner_sections", "takes_back"]

import configparser
import re
import tomllib
from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Any, Final

from spider_worker.evaluation.statuses import case_of
from spider_worker.swe_tasks.base import Task

#: The policy's name in a report.
NAME: Final = "tests-1"
#: Files of which only some sections configure the runner (``runner_sections``).
SHARED: Final = frozenset({"setup.cfg", "pyproject.toml"})

_CONFIGURATION: Final = frozenset(
    {
        "conftest.py", "pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml", "tox.ini",
        "noxfile.py", "sitecustomize.py", "usercustomize.py",
    }
)  # fmt: skip
_RUNNERS: Final = frozenset({"pytest", "_pytest", "pluggy", "iniconfig", "unittest", "py"})
_METADATA: Final = (".egg-info", ".dist-info")
_SECTIONS: Final = ("tool:pytest", "pytest", "tox:tox")

_HEADER: Final = re.compile(
    r"^(?:(?:\+\+\+|---) (?P<side>.+?)|(?:rename|copy) (?:from|to) (?P<name>.+))\t?\r?$",
    re.MULTILINE,
)
_ESCAPE: Final = re.compile(rb'\\([0-7]{3}|[abfnrtv"\\])')
_LETTERS: Final = dict(zip(b'abfnrtv"\\', b'\a\b\f\n\r\t\v"\\', strict=True))


def named_files(patch: str) -> tuple[str, ...]:
    """The files that a patch in git's form names on either side. A removed line that looks like a
    header is taken for one, so this is for patches of the data set, and to tell a name too many is
    no harm."""
    names: dict[str, None] = {}
    for found in _HEADER.finditer(patch):
        name = _unquote(found["side"] or found["name"])
        if found["side"]:
            prefix, slash, name = name.partition("/")
            if not slash or prefix not in ("a", "b"):
                continue
        names[name] = None
    return tuple(names)


def _unquote(name: str) -> str:
    """Git writes names with special characters in quotes, their bytes as octal numbers."""
    if not (name.startswith('"') and name.endswith('"') and len(name) > 1):
        return name

    def byte(found: re.Match[bytes]) -> bytes:
        code = found[1]
        return bytes([int(code, 8) & 0xFF if len(code) == 3 else _LETTERS[code[0]]])

    return _ESCAPE.sub(byte, name[1:-1].encode()).decode("utf-8", "surrogateescape")


def judging_files(task: Task) -> tuple[str, ...]:
    """The files, relative to the tree, that hold the tests which judge the task, so far as their
    ids tell, and those of the test patch."""
    files = dict.fromkeys(named_files(task.test_patch))
    for test in (*task.fail_to_pass, *task.pass_to_pass):
        if "::" in test:
            files[test.partition("::")[0]] = None
            continue
        parts = [part for part in case_of(test)[0].split(".") if part]
        # Where the module ends and its class begins cannot be seen; at most one of these is there.
        files.update(("/".join(parts[:end]) + ".py", None) for end in range(1, len(parts) + 1))
    return tuple(files)


def takes_back(name: str, *, new: bool, judging: Collection[str]) -> bool:
    """Whether an edit to the file ``name`` (relative to the tree) is taken back; ``new`` where the
    tree had none. What is in ``SHARED`` is for ``runner_sections`` to decide."""
    path = PurePosixPath(name)
    if name in judging or path.name in _CONFIGURATION or path.suffix == ".pth":
        return True
    if any(part.endswith(_METADATA) for part in path.parts):
        return True
    if not new:
        return False
    if path.parts[0].removesuffix(".py") in _RUNNERS:
        return True
    return path.suffix == ".py" and (path.stem.startswith("test_") or path.stem.endswith("_test"))


def runner_sections(name: str, content: bytes | None) -> Any:
    """What of a ``setup.cfg`` or ``pyproject.toml`` configures the runner, for comparison; None
    where nothing does, or there is no file.

    Raises ValueError where the file cannot be read.
    """
    if content is None:
        return None
    try:
        if PurePosixPath(name).name == "pyproject.toml":
            tools = tomllib.loads(content.decode()).get("tool", {})
            return {key: tools[key] for key in ("pytest", "tox") if key in tools} or None
        parser = configparser.RawConfigParser(strict=False)
        parser.read_string(content.decode())
    except (ValueError, RecursionError, AttributeError, TypeError, configparser.Error) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    return {key: dict(parser[key]) for key in _SECTIONS if key in parser} or None
