"""The same instances, in the same order, every time."""

from __future__ import annotations

import random

import pytest

from spider_sdk.errors import ConfigError, FatalJobError
from spider_worker.swe_tasks.base import Origin, Task
from spider_worker.swe_tasks.selection import select_tasks


def task(name: str, statement: str = "p") -> Task:
    return Task(name, "r", statement, Origin("dir", "/x"))


TASKS = [task(f"{repo}__{repo}.{number}") for repo in ("conan-io", "flask") for number in range(20)]


def ids(tasks: list[Task]) -> list[str]:
    return [each.instance_id for each in tasks]


def test_without_options_it_is_the_set() -> None:
    assert select_tasks([*TASKS, None]) == TASKS


def test_the_filter_matches_from_the_start() -> None:
    assert ids(select_tasks(TASKS, instance_filter="conan-io__conan.*1$")) == [
        "conan-io__conan-io.1",
        "conan-io__conan-io.11",
    ]
    with pytest.raises(FatalJobError, match=r"no instance that matches 'onan'.* 40 rows"):
        select_tasks(TASKS, instance_filter="onan")


def test_a_filter_that_does_not_compile_is_a_fault_of_the_config() -> None:
    with pytest.raises(ConfigError, match="instance_filter: 'a\\('"):
        select_tasks(TASKS, instance_filter="a(")


def test_a_seed_chooses_the_same_whatever_the_order_of_rows() -> None:
    chosen = select_tasks(TASKS, seed=7, max_instances=5)
    # Pinned: a resumed job has to find what an earlier release chose.
    assert ids(chosen) == PINNED
    for shuffle in range(5):
        rows = list(TASKS)
        random.Random(shuffle).shuffle(rows)
        assert select_tasks(rows, seed=7, max_instances=5) == chosen
    assert select_tasks(TASKS, seed=7, max_instances=9)[:5] == chosen, "more keeps what was there"
    assert select_tasks(TASKS, seed=8, max_instances=5) != chosen
    assert sorted(ids(select_tasks(TASKS, seed=7))) == sorted(ids(TASKS))


def test_max_instances_counts_after_the_filter() -> None:
    assert ids(select_tasks(TASKS, instance_filter="flask", max_instances=2)) == [
        "flask__flask.0",
        "flask__flask.1",
    ]


def test_an_instance_that_comes_twice_counts_once_or_is_an_error() -> None:
    assert select_tasks([task("a"), task("b"), task("a")]) == [task("a"), task("b")]
    with pytest.raises(FatalJobError, match="two different rows with the instance_id a"):
        select_tasks([task("a"), task("a", "else")])


def test_an_empty_set_is_an_error() -> None:
    with pytest.raises(FatalJobError, match="there is no instance among the data set's 1 rows"):
        select_tasks([None])


PINNED = [
    "conan-io__conan-io.18",
    "conan-io__conan-io.6",
    "flask__flask.8",
    "flask__flask.17",
    "conan-io__conan-io.8",
]
