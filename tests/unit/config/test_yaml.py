"""YAML means what it says, and every value keeps its line."""

from __future__ import annotations

import pytest

from spider_sdk.config.positions import read_yaml
from spider_sdk.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-5", 5e-5),
        ("1e-3", 1e-3),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-2.", -2.0),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("+3", 3),
        ("18446744073709551615", 2**64 - 1),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("on", "on"),
        ("yes", "yes"),
        ("no", "no"),
        ("OFF", "OFF"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("'5'", "5"),
        ('"true"', "true"),
        ("!!str 5", "5"),
        ("!!int '5'", 5),
        ("train[0:10]", "train[0:10]"),
        ("=", "="),
    ],
)
def test_scalars(text: str, value: object) -> None:
    found = read_yaml(f"key: {text}").data["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["1e999", ".inf", "-.Inf", ".nan", "9" * 30, "9" * 5000, "0x" + "f" * 20]
)
def test_numbers_that_json_cannot_carry(text: str) -> None:
    document = read_yaml(f"a: 1\nkey: {text}")
    assert [(one.path, one.line) for one in document.problems] == [("key", 2)]


def test_lines_of_keys_and_items() -> None:
    document = read_yaml("a:\n  b: 1\n  c:\n    - x\n    - d: >-\n        long\n")
    assert document.lines[("a", "b")] == 2
    assert document.lines[("a", "c", 0)] == 4
    assert document.lines[("a", "c", 1, "d")] == 5
    assert document.line(("a", "c", 1, "nothing")) == 5
    assert document.line(("nowhere",)) == 1


def test_duplicate_keys_name_both_lines() -> None:
    (problem,) = read_yaml("a: 1\nb: 2\na: 3\n", "job.yaml").problems
    assert str(problem) == "job.yaml:3: a: given twice, first in line 1"


def test_anchors_and_merges() -> None:
    document = read_yaml("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\nc: *a\n")
    assert document.data["b"] == {"x": 1, "y": 3}
    assert document.data["c"] == {"x": 1, "y": 2}
    assert document.problems == []


@pytest.mark.parametrize(
    "text",
    [
        "a: [1,",
        "a: b: c",
        "a:\n\t- 1",
        "--- 1\n--- 2",
        "a: *nowhere",
        "\x00",
        "[" * 5000,
        "a: &a [*a]",
        "a: &a {b: *a}",
        "a: !!python/object:os.system x",
        "a: !!set {x, y}",
        "? [1, 2]\n: 3",
        "a: &a\n  <<: *a",
        "a: {<<: 5}",
        "a: !!timestamp 2024-01-01",
    ],
)
def test_what_is_refused(text: str) -> None:
    try:
        problems = tuple(read_yaml(text, "job.yaml").problems)
    except ConfigError as error:
        problems = error.problems
    assert problems
    assert all(problem.file == "job.yaml" for problem in problems)


def test_aliases_do_not_explode() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(ConfigError, match="more than 100000 values"):
        read_yaml("\n".join(lines))


def test_merges_do_not_explode() -> None:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 12)]
    with pytest.raises(ConfigError, match="more than 100000 values"):
        read_yaml("\n".join(lines))
