"""docs/training.md names every option, with its default, and every parameter."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from spider_sdk.config.model import OnPolicyOptions, TeacherConfig
from spider_worker.torch_models.parameters import MODEL_PARAMETERS
from spider_worker.trainers import local, tinker

TEXT = (Path(__file__).parents[3] / "docs" / "training.md").read_text("utf-8")


def section(title: str) -> str:
    return TEXT.partition(f"## {title}")[2].partition("\n## ")[0]


def rows(text: str) -> dict[str, str]:
    """What stands in the second column, by each name in the first."""
    found = {}
    for first, second in re.findall(r"^\| (`[^|]+) \| ?([^|]*?) ?\|", text, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", first):
            found[name] = second
    return found


def test_every_option_is_told_with_its_default() -> None:
    told = rows(section("generation.on_policy_options"))
    options = {field.name: field.default for field in dataclasses.fields(OnPolicyOptions)}
    assert told.keys() == options.keys()
    for name, default in options.items():
        if isinstance(default, bool):
            assert told[name] == str(default).lower()
        elif isinstance(default, int | float):
            assert float(told[name]) == default, name
        elif isinstance(default, str):
            assert told[name] == default


def test_every_field_of_a_teacher_is_told() -> None:
    named = re.search(r"A teacher is `\{([^}]+)\}`", TEXT)
    assert named is not None
    fields = {field.name for field in dataclasses.fields(TeacherConfig)}
    assert set(named.group(1).split(", ")) == fields - {"api_key"}


def test_every_parameter_is_told() -> None:
    ours, theirs = section("model.parameters").split("Of a student at Tinker")
    assert rows(ours).keys() - {"vllm"} == local.TRAINER_PARAMETERS.keys()
    assert list(rows(ours))[: len(MODEL_PARAMETERS)] == list(MODEL_PARAMETERS)
    assert rows(theirs).keys() == tinker.TRAINER_PARAMETERS.keys()
