"""Names of files and configurations: as the seed draws them, and safe whatever they come from."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from spider_worker.trajectories.layout import (
    MAX_CONFIG_NAME,
    Layout,
    config_name,
    dataset_name,
    is_local,
    log_name,
    model_name,
    safe_name,
    shown_name,
)


def layout(model: str = "gpt-4o", dataset: str = "SWE-bench/SWE-smith", n: int = 30) -> Layout:
    return Layout.of(
        "trajectories",
        dataset=dataset,
        split="train",
        agent_class="CodeActAgent",
        model=model,
        max_iterations=n,
    )


def test_the_tree_is_the_documented_one() -> None:
    tree = layout()
    root = "trajectories/SWE-bench__SWE-smith-train/CodeActAgent/gpt-4o_maxiter_30"
    assert tree.output == Path(root) / "output.jsonl"
    assert tree.metadata == Path(root) / "metadata.json"
    assert tree.log("conan-io__conan.86f29e13.lm_1") == (
        Path(root) / "infer_logs" / "instance_conan-io__conan.86f29e13.lm_1.log"
    )
    assert tree.log("one", 2).name == "instance_one.run2.log"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("openai/gpt-4o", "gpt-4o"),
        ("accounts/fireworks/models/llama-v3p1-70b", "llama-v3p1-70b"),
        ("ollama/qwen3:8b", "qwen3_8b"),
        ("vertex_ai/claude@20250101", "claude-20250101"),
        ("/models/mine/", "mine"),
    ],
)
def test_a_models_name(model: str, name: str) -> None:
    assert model_name(model) == name
    assert layout(model).root.name == f"{name}_maxiter_30"


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("princeton-nlp/SWE-bench_Verified", "princeton-nlp__SWE-bench_Verified"),
        ("tasks.jsonl", "tasks"),
        ("data/tasks.ndjson", "tasks"),
        ("data/tasks.JSONL", "tasks"),
        ("/home/somebody/private/tasks.jsonl", "tasks"),
        ("../tasks.json", "tasks"),
        ("~/tasks.jsonl", "tasks"),
        ("C:\\data\\tasks.jsonl", "tasks"),
    ],
)
def test_a_data_sets_name(dataset: str, name: str) -> None:
    assert dataset_name(dataset) == name
    assert layout(dataset=dataset).root.parts[1] == f"{name}-train"


def test_a_path_is_shown_by_its_last_part_alone() -> None:
    assert shown_name("/home/somebody/tasks.jsonl") == "tasks.jsonl"
    assert shown_name("SWE-bench/SWE-smith") == "SWE-bench/SWE-smith"
    assert not is_local("SWE-bench/SWE-smith")


@pytest.mark.parametrize(
    "hostile",
    ["", ".", "..", "../../etc/passwd", "/etc/passwd", "a\0b", "a\nb", "-rf", ".hidden", "x" * 500,
     "ü" * 200, "\ud800", "con|<>"],
)  # fmt: skip
def test_a_hostile_id_stays_in_its_folder(hostile: str, tmp_path: Path) -> None:
    name = log_name(hostile)
    path = tmp_path / name
    path.write_text("")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert os.path.normpath(path) == str(path)
    assert name == log_name(hostile)


@hypothesis.given(st.text(), st.text())
def test_names_are_safe_and_differ_where_the_ids_do(one: str, other: str) -> None:
    for name in (one, other):
        safe = safe_name(name)
        assert safe.isascii()
        assert 0 < len(safe) <= 180
        assert not set(safe) & set("/\\:\0 \n")
        assert safe[0] not in ".-"
    assert (safe_name(one) == safe_name(other)) == (one == other)


def test_an_automatic_configuration_names_model_data_set_and_iterations() -> None:
    name = config_name("openai/gpt-4o", "SWE-bench/SWE-smith", 30)
    assert name == "gpt-4o_SWE-bench__SWE-smith_30iter"


def test_a_long_configuration_is_cut_and_still_its_own() -> None:
    one = config_name("m" * 90, "org/set-one", 100)
    other = config_name("m" * 90, "org/set-two", 100)
    assert len(one) == MAX_CONFIG_NAME
    assert one.endswith("_100iter")
    assert one != other


@pytest.mark.parametrize("name", ["..", ".", ".git", "-rf", "../..", "./x", ".../"])
def test_no_component_is_hidden_an_option_or_another_folder(name: str) -> None:
    assert safe_name(name)[0] not in ".-"
    assert (
        Layout.of(
            "out", dataset=f"{name}/b", split=name, agent_class=name, model=name, max_iterations=1
        )
        .root.resolve()
        .parents[2]
        == Path("out").resolve()
    )
