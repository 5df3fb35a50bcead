"""Which of a set's instances a job works on: the same ones, in the same order, every time.

A job that is resumed, or submitted again with more workers, has to find the instances it knows. So
the choice depends on nothing but the set's instances and three options. With a seed it does not
depend on the order of rows either: each instance has a place that follows from the seed and its
own id, and taking more of them keeps those that were taken before.

A set may be far larger than what a job takes of it, so tasks that are not taken are not kept.
"""

from __future__ import annotations

__all__ = ["check_filter", "select_tasks"]

import collections
import dataclasses
import hashlib
import heapq
import itertools
import json
import re
from collections.abc import Iterable, Iterator

import orjson

from spider_sdk.errors import ConfigError, FatalJobError, Problem
from spider_worker.swe_tasks.base import Task


def check_filter(pattern: str | None) -> re.Pattern[str] | None:
    """The compiled ``instance_filter``. Raises ConfigError where it does not compile."""
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except re.error as error:
        said = f"{pattern!r} is no regular expression: {error}"
        raise ConfigError([Problem("instance_filter", said)]) from error


def select_tasks(
    tasks: Iterable[Task | None],
    *,
    instance_filter: str | None = None,
    max_instances: int | None = None,
    seed: int | None = None,
) -> list[Task]:
    """Tasks whose id matches ``instance_filter`` from its start (None: all), the first
    ``max_instances`` of them (None: all). ``seed`` None keeps the set's order; with one the order
    is by a hash of the seed and the id. A None among ``tasks`` is a row that was skipped.

    An instance that comes twice counts once where both are the same task. Raises FatalJobError
    where they differ, or nothing is left, ConfigError for a filter that does not compile.

    ``tasks`` are read to their end, and no more than ``max_instances`` of them are held.
    """
    pattern = check_filter(instance_filter)
    known: dict[str, int] = {}  # a hash by id, since the tasks themselves are let go
    seen = 0

    def matching() -> Iterator[Task]:
        nonlocal seen
        for task in tasks:
            seen += 1
            if task is None or (pattern is not None and pattern.match(task.instance_id) is None):
                continue
            content = _hash(task)
            if task.instance_id not in known:
                known[task.instance_id] = content
                yield task
            elif known[task.instance_id] != content:
                raise FatalJobError(
                    f"the data set has two different rows with the instance_id {task.instance_id}"
                )

    rest = matching()
    chosen = _first(rest, max_instances, seed)
    collections.deque(rest, maxlen=0)  # two rows that differ are an error wherever they stand
    if not known:
        which = "" if instance_filter is None else f" that matches {instance_filter!r}"
        raise FatalJobError(f"there is no instance{which} among the data set's {seen} rows")
    return chosen


def _first(tasks: Iterable[Task], count: int | None, seed: int | None) -> list[Task]:
    """The first ``count`` in the order of ``seed``."""
    if seed is None:
        return list(itertools.islice(tasks, count))

    def place(task: Task) -> bytes:
        return _place(seed, task.instance_id)

    return sorted(tasks, key=place) if count is None else heapq.nsmallest(count, tasks, key=place)


def _hash(task: Task) -> int:
    """Of all that it holds, the same for equal tasks."""
    try:
        return hash(orjson.dumps(task, option=orjson.OPT_SORT_KEYS))
    except orjson.JSONEncodeError:  # numbers past 64 bits and halves of characters: slower
        return hash(json.dumps(dataclasses.asdict(task), sort_keys=True, default=repr))


def _place(seed: int, instance_id: str) -> bytes:
    # A generator's shuffle would depend on the number and the order of what is shuffled.
    return hashlib.blake2b(instance_id.encode(), key=str(seed).encode(), digest_size=16).digest()
