"""Rows of the public sets, and of files in the offline format, as tasks.

The form of a row is recognised by the columns of its set:

========== ================================================ ====================================
form       columns that tell                                 what ``patch`` is
========== ================================================ ====================================
offline    ``repo_source``                                   puts the fault in ("": it is there)
rebench    ``install_config`` and ``base_commit``            mends the fault
bench      ``base_commit`` and ``test_patch``                mends the fault
smith      ``image_name``, neither of the former             puts the fault in
========== ================================================ ====================================

``bench`` is SWE-bench, Verified and Lite, and SWE-Gym, which is told from them by what it lacks
(``environment_setup_commit``) and by lists where they have JSON texts. Images are those that each
set's own harness runs. A test command is named by SWE-rebench and the offline format; SWE-smith
says none, and its Python profiles run pytest with little else, on the files of the tests that are
to pass, so that is what its tasks get. The others' test commands are per repository and version in
their harness, and stay None.
"""

from __future__ import annotations

__all__ = ["SMITH_TEST_CMD", "form_of", "image_of", "to_task"]

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from spider_sdk.errors import FatalJobError
from spider_sdk.remotes import is_remote, remote_problem
from spider_worker.swe_tasks.base import Origin, Task

SMITH_TEST_CMD: Final = "pytest --disable-warnings --color=no --tb=no --verbose"

_ALL: Final = frozenset(
    {"instance_id", "repo", "patch", "problem_statement", "FAIL_TO_PASS", "PASS_TO_PASS"}
)
_ACCOUNTS: Final[Mapping[str, tuple[str, str]]] = {
    "bench": ("swebench", "_1776_"),
    "gym": ("xingyaoww", "_s_"),
    "rebench": ("swerebench", "_1776_"),
}
_FORMS: Final[Mapping[str, frozenset[str]]] = {
    "offline": _ALL | {"repo_source"},
    "rebench": _ALL | {"base_commit", "test_patch", "install_config"},
    "bench": _ALL | {"base_commit", "test_patch"},
    "smith": _ALL | {"image_name"},
}


def form_of(columns: Iterable[str]) -> str:
    """``offline``, ``rebench``, ``bench`` or ``smith``: the form of a set with these columns.

    Raises FatalJobError, naming what was found and what is expected, where it is none.
    """
    found = set(columns)
    for form, needed in _FORMS.items():
        if needed <= found:
            return form
    expected = "; or ".join(
        f"{', '.join(sorted(needed - _ALL))} ({form})" for form, needed in _FORMS.items()
    )
    raise FatalJobError(
        "the data set is none of software tasks in a form that is known. Its columns are"
        f" {', '.join(sorted(found)) or '(none)'}. Expected are {', '.join(sorted(_ALL))} and"
        f" besides {expected}"
    )


def to_task(row: Mapping[str, Any], *, form: str, folder: str = ".") -> Task | None:
    """A row as a task; None for one that is none: without a problem statement there is nothing to
    be done. ``folder`` is where a relative ``repo_source`` starts from.

    Raises FatalJobError, naming the instance and the column, for what a column cannot hold.
    """
    instance_id = row.get("instance_id")
    if not isinstance(instance_id, str) or not instance_id:
        raise FatalJobError(f"a row has the instance_id {instance_id!r}: expected a text")
    reader = _Reader(instance_id, row)
    statement = reader.text("problem_statement")
    if not statement.strip():
        return None
    common: dict[str, Any] = {
        "instance_id": instance_id,
        "repo": reader.text("repo"),
        "problem_statement": statement,
        "base_commit": reader.text("base_commit") or None,
        "test_patch": reader.text("test_patch"),
        "fail_to_pass": reader.names("FAIL_TO_PASS"),
        "pass_to_pass": reader.names("PASS_TO_PASS"),
        "row": row,
    }
    return _READERS[form](reader, common, folder)


def image_of(instance_id: str, collection: str = "bench") -> str:
    """The image of an instance of ``bench`` (SWE-bench), ``gym`` or ``rebench``, as each one's
    harness names it. A name in a registry has no two underscores in a row, so each collection has
    letters of its own in their place."""
    account, between = _ACCOUNTS[collection]
    return f"{account}/sweb.eval.x86_64.{instance_id.replace('__', between)}:latest".lower()


class _Reader:
    """One row's columns, by type."""

    def __init__(self, instance_id: str, row: Mapping[str, Any]) -> None:
        self.instance_id = instance_id
        self.row = row

    def text(self, column: str) -> str:
        """ "" where the column is missing or null."""
        value = self.row.get(column)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.error(column, "expected a text")
        return value

    def names(self, column: str) -> tuple[str, ...]:
        """A list, or the JSON text of one."""
        value = self.row.get(column)
        if isinstance(value, str):
            try:
                value = json.loads(value) if value.strip() else []
            except json.JSONDecodeError:
                raise self.error(column, "expected a list or the JSON text of one") from None
        elif value is not None and not isinstance(value, list | tuple):
            value = value.tolist() if hasattr(value, "tolist") else value
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
            raise self.error(column, "expected a list of texts")
        return tuple(value)

    def error(self, column: str, expected: str) -> FatalJobError:
        value = repr(self.row.get(column))[:80]
        return FatalJobError(f"{self.instance_id}: {column} is {value}: {expected}")


def _smith(reader: _Reader, common: dict[str, Any], _folder: str) -> Task:
    image = reader.text("image_name")
    if not image:
        raise reader.error("image_name", "expected the name of an image")
    if not reader.text("patch").strip():
        raise reader.error("patch", "expected the patch that puts the fault in")
    return Task(
        **common,
        origin=Origin("image", image),
        image_name=image,
        bug_patch=reader.text("patch"),
        test_cmd=SMITH_TEST_CMD,
    )


def _bench(reader: _Reader, common: dict[str, Any], _folder: str) -> Task:
    lists = not isinstance(reader.row.get("FAIL_TO_PASS"), str)
    gym = lists and "environment_setup_commit" not in reader.row
    image = reader.text("image_name") or image_of(reader.instance_id, "gym" if gym else "bench")
    return Task(
        **common, origin=Origin("image", image), image_name=image, gold_patch=reader.text("patch")
    )


def _rebench(reader: _Reader, common: dict[str, Any], _folder: str) -> Task:
    config = reader.row.get("install_config")
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except json.JSONDecodeError:
            raise reader.error("install_config", "expected an object or its JSON text") from None
    command = config.get("test_cmd") if isinstance(config, Mapping) else None
    if isinstance(command, list):
        command = " && ".join(map(str, command))
    image = reader.text("docker_image") or reader.text("image_name")
    image = image or image_of(reader.instance_id, "rebench")
    return Task(
        **common,
        origin=Origin("image", image),
        image_name=image,
        gold_patch=reader.text("patch"),
        test_cmd=command or None,
    )


def _offline(reader: _Reader, common: dict[str, Any], folder: str) -> Task:
    source = reader.text("repo_source")
    if not source:
        raise reader.error("repo_source", "expected a folder with a git repository or a bundle")
    if is_remote(source):
        if (said := remote_problem(source)) is not None:
            raise reader.error("repo_source", said)
        origin = Origin("git", source)
    else:
        path = os.path.join(folder, os.path.expanduser(source))
        origin = Origin("bundle" if os.path.isfile(path) else "dir", os.path.abspath(path))
    return Task(
        **common,
        origin=origin,
        image_name=reader.text("image_name") or None,
        bug_patch=reader.text("patch"),
        gold_patch=reader.text("gold_patch") or None,
        test_cmd=reader.text("test_cmd") or None,
        setup_cmds=reader.names("setup_cmds"),
    )


_READERS: Final[Mapping[str, Callable[[_Reader, dict[str, Any], str], Task]]] = {
    "offline": _offline,
    "rebench": _rebench,
    "bench": _bench,
    "smith": _smith,
}
