"""A SWE job as a document: read, written again, changed, parted from its secrets."""

from __future__ import annotations

from typing import Any

import pytest

from spider_sdk.config import AppConfig, job_document, lift_secrets, parse_job
from spider_sdk.config.model import InputFile, SweConfig
from spider_sdk.errors import ConfigError
from spider_sdk.jobs import Queue
from spider_sdk.submission import Submittable, needed_for

FULL: dict[str, Any] = {
    "llm_model": "openai/m",
    "dataset": "tasks.jsonl",
    "condenser": {"max_size": 80, "keep_first": 4},
    "num_workers": 3,
    "max_budget_total": 5.0,
    "inputs": [{"name": "tasks.jsonl", "sha256": "a" * 64}],
}


def paths(document: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_job(document)
    return [problem.path for problem in caught.value.problems]


def test_a_document_is_read_and_written_again() -> None:
    job = parse_job({"swe": FULL})
    assert isinstance(job, SweConfig)
    assert (job.queue, job.parallelism) == (Queue.SWE_AGENT, None)
    assert job.inputs == (InputFile("tasks.jsonl", "a" * 64),)
    written = job_document(job)
    assert set(written) == {"swe"}
    assert written["swe"].items() >= FULL.items()
    assert parse_job(written) == job


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"swe": {}}, ["llm_model"]),
        ({"swe": None}, ["(root)"]),
        ({"swe": []}, ["(root)"]),
        ({"swe": {"llm_model": "m", "split": 5, "seed": -1}}, ["split", "seed"]),
        ({"swe": {"llm_model": "m", "temperature": float("nan")}}, ["temperature"]),
        ({"swe": FULL, "source": {}, "metadata": {}}, ["job.source", "job.metadata"]),
    ],
)
def test_problems_have_paths_as_in_the_file(document: Any, told: list[str]) -> None:
    assert paths(document) == told


def test_a_budget_too_small_for_one_instance_is_refused() -> None:
    each = {**FULL, "max_budget_per_instance": 6}
    assert paths({"swe": each}) == ["max_budget_total"]
    parse_job({"swe": {**each, "max_budget_total": 6}})


@pytest.mark.parametrize("name", ["..", ".", "_a", "-a", "a b", "mod\u00e8le", "a" * 97])
def test_a_configuration_that_the_hub_cannot_hold_is_refused(name: str) -> None:
    hub = {"llm_model": "m", "hf_repo_id": "me/d"}
    assert paths({"swe": {**hub, "hf_config_name": name}}) == ["hf_config_name"]
    parse_job({"swe": {**hub, "hf_config_name": "4o_a.b-c"}})


def test_a_submission_is_the_job_without_its_secrets() -> None:
    config = AppConfig.from_dict({"llm_model": "m", "llm_api_key": "sk-1"}, environ={})
    ready = Submittable.build(config, {"num_workers": 4})
    assert ready.job["swe"]["num_workers"] == 4
    (name,) = ready.env
    assert ready.job["swe"]["llm_api_key_env"] == name
    assert "sk-1" not in str(ready.job)
    assert needed_for(ready.job, config) == ready.env, "a retry brings them again"


def test_a_missing_key_is_told_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_MODEL_KEY", raising=False)
    config = AppConfig.from_dict({"llm_model": "m", "llm_api_key_env": "MY_MODEL_KEY"}, environ={})
    with pytest.raises(ConfigError, match="MY_MODEL_KEY"):
        Submittable.build(config)
    assert lift_secrets(config.document, {"MY_MODEL_KEY": "k"})[1] == {"MY_MODEL_KEY": "k"}


def said(**swe: Any) -> dict[str, str]:
    """What is wrong, by path."""
    with pytest.raises(ConfigError) as caught:
        parse_job({"swe": {"llm_model": "m", **swe}})
    return {problem.path: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize(
    "condenser",
    [True, False, {}, {"max_size": 6, "keep_first": 1}, {"max_tokens": 30000}, {"keep_first": 0}],
)
def test_condensers_that_there_are(condenser: Any) -> None:
    job = parse_job({"swe": {"llm_model": "m", "condenser": condenser}})
    assert isinstance(job, SweConfig)
    assert job.condenser == condenser


@pytest.mark.parametrize(
    ("name", "meant"),
    [("noop", "false"), ("none", "false"), ("false", "false"), ("llm", "true"), ("ture", "true")],
)
def test_a_condenser_has_no_name(name: str, meant: str) -> None:
    (words,) = said(condenser=name).values()
    assert words.startswith("expected true, false or a mapping of max_size, max_tokens, keep_first")
    assert f"did you mean {meant}?" in words


@pytest.mark.parametrize(
    ("options", "path", "words"),
    [
        ({"max_sise": 5}, "condenser.max_sise", "did you mean max_size?"),
        ({"kind": "noop"}, "condenser.kind", "known here: max_size"),
        ({"max_size": "80"}, "condenser.max_size", "expected a whole number"),
        ({"minimum_progress": 1}, "condenser.minimum_progress", "less than 1"),
        ({"max_size": 6}, "condenser.max_size", "half of it (3) must be more than keep_first (2)"),
        ({"keep_first": 200}, "condenser.max_size", "half of it (120)"),
    ],
)
def test_options_of_a_condenser_are_looked_at_when_the_file_is_read(
    options: dict[str, Any], path: str, words: str
) -> None:
    found = said(condenser=options)
    assert set(found) == {path}
    assert words in found[path]


@pytest.mark.parametrize("end", ["?key=sk-abc", "#sk-abc", "?"])
def test_an_address_holds_nothing_behind_its_path(end: str) -> None:
    found = said(llm_base_url=f"http://host:8000/v1{end}")
    assert "nothing behind its path" in found["llm_base_url"]
    assert "llm_api_key_env" in found["llm_base_url"]


def test_an_address_holds_no_user() -> None:
    assert "no user or password" in said(llm_base_url="http://me:word@host/v1")["llm_base_url"]
