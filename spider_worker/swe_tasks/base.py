"""A software task: what every data set of them is normalised to.

A task is a repository in a state with a fault, the words that describe the fault, and tests that
tell whether it was mended. What gives the answer away (``gold_patch``, ``test_patch``, the history
of the repository) never enters the place where an agent works.
"""

from __future__ import annotations

__all__ = ["Origin", "Task"]

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the tree comes from. ``kind`` is ``image`` (``ref`` is a container image that holds
    the repository under ``/testbed``), ``git`` (an address to clone), ``bundle`` (a git bundle) or
    ``dir`` (a folder with a git repository)."""

    kind: str
    ref: str


@dataclasses.dataclass(frozen=True)
class Task:
    """One instance. ``base_commit`` None: the origin as it stands. ``bug_patch`` is applied on top
    of it to put the fault in ("": the fault is there already). ``gold_patch`` mends the fault; None
    where the fault is a ``bug_patch`` and taking that back mends it. ``test_patch`` adds the tests
    that judge ("": they are there). ``test_cmd`` None: the data set names none, and the runner of
    the tests follows from the data set's own harness. ``row`` is the data set's own, as it came.
    """

    instance_id: str
    repo: str
    problem_statement: str
    origin: Origin
    image_name: str | None = None
    base_commit: str | None = None
    bug_patch: str = ""
    gold_patch: str | None = None
    test_patch: str = ""
    fail_to_pass: tuple[str, ...] = ()
    pass_to_pass: tuple[str, ...] = ()
    test_cmd: str | None = None
    setup_cmds: tuple[str, ...] = ()
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict)
