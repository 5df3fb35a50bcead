"""The same instances, in the same order, every time."""

from __future__ import annotations

import dataclasses
import random
import re
import weakref
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spider_sdk.errors import ConfigError, FatalJobError
from spider_worker.swe_tasks.base import Origin, Task
from spider_worker.swe_tasks.selection import _place, select_tasks


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


def test_two_rows_that_differ_are_found_behind_what_is_taken() -> None:
    rows = [*TASKS, task("a"), task("a", "else")]
    for options in ({"max_instances": 1}, {"max_instances": 1, "seed": 7}):
        with pytest.raises(FatalJobError, match="two different rows with the instance_id a"):
            select_tasks(rows, **options)


@pytest.mark.parametrize(("one", "other"), [(1, 2), (2**70, 2**70 + 1), ("\ud800", "\ud801")])
def test_rows_differ_by_any_column(one: object, other: object) -> None:
    rows = [{"x": one, "y": [1]}, {"y": [1], "x": one}, {"x": other, "y": [1]}]
    first, again, else_ = (dataclasses.replace(task("a"), row=row) for row in rows)
    assert select_tasks([first, again]) == [first]
    with pytest.raises(FatalJobError, match="two different rows"):
        select_tasks([first, else_])


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("count", [1, 5])
def test_no_more_tasks_are_held_than_are_taken(seed: int | None, count: int) -> None:
    made: list[weakref.ref[Task]] = []
    most = 0

    def read(number: int) -> Task:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in made))
        one = task(f"t{number}")
        made.append(weakref.ref(one))
        return one

    chosen = select_tasks(map(read, range(100)), max_instances=count, seed=seed)
    assert (len(chosen), len(made)) == (count, 100)
    assert most <= count + 1


def naive(
    tasks: Sequence[Task | None], pattern: str | None, count: int | None, seed: int | None
) -> list[Task] | str:
    """What ``select_tasks`` is to choose, or the beginning of its error."""
    found: dict[str, Task] = {}
    for each in tasks:
        if each is not None and re.match(pattern or "", each.instance_id):
            if found.setdefault(each.instance_id, each) != each:
                return "the data set has two different rows"
    if not found:
        return "there is no instance"
    order = list(found.values())
    if seed is not None:
        order.sort(key=lambda each: _place(seed, each.instance_id))
    return order[:count]


@given(
    tasks=st.lists(
        st.none()
        | st.builds(task, st.sampled_from("abcdefgh"), st.sampled_from(["p"] * 9 + ["else"])),
        max_size=20,
    ),
    pattern=st.sampled_from([None, "[a-d]", "z"]),
    count=st.none() | st.integers(0, 10),
    seed=st.none() | st.integers(0, 3),
)
def test_what_is_chosen_is_what_the_whole_set_sorted_and_cut_has(
    tasks: list[Task | None], pattern: str | None, count: int | None, seed: int | None
) -> None:
    wanted = naive(tasks, pattern, count, seed)

    def chosen() -> list[Task]:
        rows: Iterator[Task | None] = iter(tasks)
        return select_tasks(rows, instance_filter=pattern, max_instances=count, seed=seed)

    if isinstance(wanted, str):
        with pytest.raises(FatalJobError, match=wanted):
            chosen()
    else:
        assert chosen() == wanted


PINNED = [
    "conan-io__conan-io.18",
    "conan-io__conan-io.6",
    "flask__flask.8",
    "flask__flask.17",
    "conan-io__conan-io.8",
]
