"""A run goes on with the settings that it was begun with, or not at all."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.errors import UsageError
from spider_worker.trajectories.metadata import (
    open_run,
    read_metadata,
    run_metadata,
    take_versions,
)
from tests.support.trajectories import CONFIG


def metadata(**changes: Any) -> dict[str, Any]:
    return run_metadata(dataclasses.replace(CONFIG, **changes), git_commit="abc")


def test_it_has_the_keys_that_readers_look_for_and_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metadata.json"
    open_run(path, metadata())
    assert set(json.loads(path.read_text())) == {
        "agent_class", "llm_config", "agent_config", "max_iterations", "eval_output_dir",
        "start_time", "git_commit", "dataset", "data_split", "details", "condenser_config",
    }  # fmt: skip
    assert CONFIG.llm_api_key is not None
    assert CONFIG.llm_api_key not in path.read_text()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"llm_model": "gpt-5"}, 'llm_config.model was "openai/gpt-4o", is "gpt-5"'),
        ({"temperature": 0.5}, "llm_config.temperature was null, is 0.5"),
        ({"max_iterations": 50}, "max_iterations was 30, is 50"),
        ({"dataset": "a/b"}, "dataset was"),
        ({"split": "test"}, "data_split was"),
        ({"agent_class": "Other"}, "agent_class was"),
        ({"condenser": {"kind": "x"}}, "condenser_config was null"),
        ({"workspace": "bwrap"}, "details.workspace was"),
        ({"max_budget_per_instance": 1.0}, "details.max_budget_per_instance was"),
    ],
)
def test_what_changes_results_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    path = tmp_path / "metadata.json"
    open_run(path, metadata())
    before = path.read_bytes()
    with pytest.raises(UsageError) as refused:
        open_run(path, metadata(**change))
    assert key in str(refused.value)
    assert path.read_bytes() == before


def test_all_differing_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metadata.json"
    open_run(path, metadata())
    with pytest.raises(UsageError, match=r"max_iterations was 30, is 5; data_split was"):
        open_run(path, metadata(max_iterations=5, split="test"))


@pytest.mark.parametrize(
    "change",
    [
        {"max_instances": 7},
        {"instance_filter": "x.*"},
        {"n_attempts": 4},
        {"timeout_seconds": 9.0},
        {"llm_base_url": "http://elsewhere/v1"},
        {"llm_api_key": "another"},
        {"num_workers": 9},
        {"hf_repo_id": "a/b"},
    ],
)
def test_more_instances_more_time_or_another_address_is_no_other_run(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "metadata.json"
    first = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    begun = open_run(path, run_metadata(CONFIG, start_time=first))
    now = open_run(path, metadata(**change))
    assert now["start_time"] == begun["start_time"] == "2026-01-02T00:00:00+00:00"
    assert read_metadata(path) == now


def test_another_version_is_no_other_run(tmp_path: Path) -> None:
    path = tmp_path / "metadata.json"
    open_run(path, run_metadata(CONFIG, agent_config={"spider": "0.1"}))
    now = open_run(path, run_metadata(CONFIG, agent_config={"spider": "0.2"}))
    assert now["agent_config"] == {"spider": "0.2"}


def test_versions_are_taken_from_the_job_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metadata.json"
    made = metadata(max_instances=3, timeout_seconds=5.0)
    made["details"] |= {"spider": "9", "openhands-sdk": "1.2"}
    take_versions(path, made)
    assert not path.exists()
    ours = open_run(path, metadata())
    take_versions(path, {})
    assert read_metadata(path) == ours
    take_versions(path, made)
    taken = read_metadata(path)
    assert taken == ours | {"details": ours["details"] | {"spider": "9", "openhands-sdk": "1.2"}}
    assert list(tmp_path.iterdir()) == [path]
    again = open_run(path, metadata(max_instances=3))
    assert again["details"]["openhands-sdk"] == "1.2", "what is not known here stays"
    assert again["details"]["max_instances"] == 3


def test_a_file_that_is_no_metadata(tmp_path: Path) -> None:
    path = tmp_path / "metadata.json"
    assert read_metadata(path) is None
    for text in ("{", "[]"):
        path.write_text(text)
        with pytest.raises(UsageError, match="cannot be read"):
            open_run(path, metadata())
