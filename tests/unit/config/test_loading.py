"""Files, overrides and interpolation; problems with their places, all at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.config import AppConfig, job_document, parse_job, parse_override
from spider_sdk.errors import ConfigError
from tests.unit.config.documents import complete_job, job


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(call: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        call()
    return {problem.path: problem.message for problem in caught.value.problems}


WRONG = """\
server:
  request_timout: 3
  verify_tls: yes
job:
  model:
    provider: vlm
    nmae: owner/model
  source:
    dataset: owner/rows
    split: 7
    max_examples: "10"
  generation:
    temperature: 0.5
    duplications: 0
    max_batch_size: true
  output:
    mode: upload_hf
"""


def test_every_problem_at_once_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, WRONG)
    with pytest.raises(ConfigError) as caught:
        AppConfig.load(path)
    problems = caught.value.problems
    assert {problem.file for problem in problems} == {str(path)}
    told = {problem.path: (problem.line, problem.message) for problem in problems}
    assert told == {
        "server.request_timout": (2, "unknown key; did you mean request_timeout?"),
        "server.verify_tls": (3, 'expected true or false, not "yes"'),
        "job.model.name": (5, "required, and not given"),
        "job.model.provider": (
            6,
            'expected vllm, openai, transformers, tinker or local (did you mean vllm?), not "vlm"',
        ),
        "job.model.nmae": (7, "unknown key; did you mean name?"),
        "job.source.split": (10, "expected text (put it between quotation marks), not 7"),
        "job.source.max_examples": (11, 'expected a whole number at least 1, not "10"'),
        "job.generation.temperature": (
            13,
            "unknown key; sampling parameters such as temperature belong under "
            "job.generation.parameters",
        ),
        "job.generation.duplications": (14, "expected a whole number at least 1, not 0"),
        "job.generation.max_batch_size": (15, "expected a whole number at least 1, not true"),
        "job.output.hf": (
            16,
            "output.mode upload_hf needs output.hf; add hf: {repo_id: owner/name} or set "
            "mode: return",
        ),
    }
    lines = [problem.line for problem in problems]
    assert lines == sorted(lines, key=lambda line: line or 0)
    assert str(caught.value).startswith(f"{path}:2: server.request_timout: unknown key")


def test_a_key_of_another_section_is_told_where_it_belongs() -> None:
    told = problems_of(lambda: parse_job(job(generation={"streaming": True})))
    assert told == {"job.generation.streaming": "unknown key; streaming belongs under job.source"}


def test_unreadable_files(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        return problems_of(lambda: AppConfig.load(path))["(file)"]

    assert message(tmp_path / "none.yaml") == "there is no such file"
    assert "cannot be read" in message(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"job: \xe9")
    assert "not UTF-8" in message(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (2 << 20))
    assert "larger than 1 MiB" in message(tmp_path / "large.yaml")
    assert "cannot be read" in message(Path("nul\0byte"))


@pytest.mark.parametrize("text", ["", "# nothing\n", "server:\n"])
def test_a_file_without_a_job(tmp_path: Path, text: str) -> None:
    told = problems_of(lambda: AppConfig.load(write(tmp_path, text)))
    assert told == {"job": "required, and not given"}


@pytest.mark.parametrize("text", ["- 1", "word", "5"])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    told = problems_of(lambda: AppConfig.load(write(tmp_path, text)))
    assert told["(root)"].startswith("expected a mapping")


def test_a_swe_file_says_what_it_does_not_know() -> None:
    told = problems_of(
        lambda: AppConfig.from_dict(
            {"llm_model": "gpt-4o", "max_iteratons": 3, "num_workers": 0, "server": {"x": 1}}
        )
    )
    assert told["max_iteratons"] == "unknown key; did you mean max_iterations?"
    assert told["num_workers"].startswith("expected a whole number at least 1")
    assert "server.x" in told
    both = problems_of(lambda: AppConfig.from_dict({"job": job(), "llm_model": "gpt-4o"}))
    assert list(both) == ["llm_model"]


def test_round_trip() -> None:
    built = parse_job(complete_job())
    assert parse_job(job_document(built)) == built
    assert job_document(built)["generation"]["parameters"] == {"temperature": 0.7, "stop": None}
    assert built.generation.seed == 2**63 + 1


def test_round_trip_on_policy() -> None:
    options = {"teacher": [{"name": "a/b", "weight": 2, "when": {"kind": ["x"]}}, "c/d"]}
    built = parse_job(
        job(
            model={"provider": "tinker"},
            generation={"on_policy": True, "on_policy_options": options},
            output={"mode": "upload_hf", "hf": {"repo_id": "me/adapter"}},
        )
    )
    assert built.output.hf is not None
    assert built.output.hf.repo_type == "model"  # the one that fits, as none was given
    assert parse_job(job_document(built)) == built


def test_the_complete_job_gives_every_key() -> None:
    # Otherwise the round trip proves less than it seems to.
    built = parse_job(complete_job())
    of_training = {"student_checkpoint_path", "on_policy_options", "on_policy", "evaluator"}
    unused = {"api_key", *of_training}
    for section in (built, built.model, built.source, built.generation, built.output):
        for field in dataclasses.fields(section):
            if field.name not in unused and field.default is not dataclasses.MISSING:
                assert getattr(section, field.name) != field.default, field.name


def test_empty_values_are_as_good_as_none() -> None:
    document = job(generation=None, output={"mode": None, "hf": None}, metadata=None)
    document["source"]["options"] = None
    document["model"]["api_key"] = None  # the format has it empty beside any provider
    built = parse_job(document)
    assert built == parse_job(job())


def test_overrides(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "job:\n  model: {provider: vllm, name: a/b, parameters: {x: 1}}\n  source: {dataset: d}\n",
    )
    config = AppConfig.load(
        path,
        {
            "job.generation.parameters.temperature": 0.2,
            "job": {"model": {"parameters": {"y": 2}}, "source": {"split": "test"}},
            "server.base_url": "http://h:1",
        },
    )
    assert config.job is not None
    assert config.job.generation.parameters == {"temperature": 0.2}
    assert config.job.model.parameters == {"x": 1, "y": 2}
    assert config.job.source.split == "test"
    assert config.document["source"] == {"dataset": "d", "split": "test"}
    assert config.server.base_url == "http://h:1"
    again = config.with_overrides({"job.source.split": "train"})
    assert again.job is not None
    assert again.job.source.split == "train"
    assert again.server == config.server
    assert again.path == str(path)


def test_a_wrong_override_has_no_line(tmp_path: Path) -> None:
    path = write(tmp_path, "job:\n  model: {provider: vllm, name: 5}\n  source: {dataset: d}\n")
    with pytest.raises(ConfigError) as caught:
        AppConfig.load(path, {"job.source.split": 7, "job.model.name.x": 1, "job..x": 1})
    places = {problem.path: problem.line for problem in caught.value.problems}
    assert places == {
        "job.model.name": 2,
        "job.source.split": None,
        "job.model.name.x": None,
        "overrides": None,
    }


def test_overrides_reach_into_lists() -> None:
    mapping = {
        "job": job(
            model={"provider": "tinker"},
            generation={"on_policy": True, "on_policy_options": {"teacher": [{"name": "a"}]}},
        )
    }
    place = "job.generation.on_policy_options.teacher"
    config = AppConfig.from_dict(mapping, {f"{place}.0.name": "b"})
    assert config.job is not None
    assert config.job.generation.on_policy_options is not None
    assert config.job.generation.on_policy_options.teacher[0].name == "b"
    told = problems_of(lambda: AppConfig.from_dict(mapping, {f"{place}.3.name": "b"}))
    assert told == {f"{place}.3.name": "expected a place in a list of 1 (counted from 0), not '3'"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("job.generation.parameters.temperature=0.2", 0.2),
        ("a.b=5e-5", 5e-5),
        ("a.b=", None),
        ("a.b= true ", True),
        ("a.b=on", "on"),
        ("a.b='5'", "5"),
        ("a.b=[1, x]", [1, "x"]),
        ("a.b={c: 1}", {"c": 1}),
        ("a.b=You are: # 1, x=y", "You are: # 1, x=y"),
        ("a.b=train[0:3]", "train[0:3]"),
    ],
)
def test_parse_override(text: str, expected: object) -> None:
    path, value = parse_override(text)
    assert path == text.partition("=")[0]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("text", ["", "a.b", "=3", "a=[1", 'a="x', "a=1e999", "a={b: 1, b: 2}"])
def test_parse_override_refuses(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_override(text)


INTERPOLATED = """\
job:
  model: {provider: openai, name: "${MODEL}", api_key: "${KEY}"}
  source:
    dataset: ${OWNER}/rows
    max_examples: ${ROWS}
    split: "${ROWS}"
  generation:
    system_prompt: costs $${ROWS} or ${ROWS}, $5
  pre_processor: {name: f, source: "def f(row): return f'${row}'"}
"""


def test_interpolation(tmp_path: Path) -> None:
    environ = {"MODEL": "m", "OWNER": "me", "ROWS": "12", "KEY": "123"}
    config = AppConfig.load(write(tmp_path, INTERPOLATED), environ=environ)
    built = config.job
    assert built is not None
    assert built.model.name == "m"
    assert built.model.api_key == "123"  # a key of digits is still text
    assert built.source.dataset == "me/rows"
    assert built.source.max_examples == 12
    assert built.source.split == "12"  # quoted: stays text
    assert built.generation.system_prompt == "costs ${ROWS} or 12, $5"
    assert built.pre_processor is not None
    assert "${row}" in built.pre_processor.source
    assert config.interpolated == {
        "job.model.name": "MODEL",
        "job.model.api_key": "KEY",
        "job.source.dataset": "OWNER",
        "job.source.max_examples": "ROWS",
        "job.source.split": "ROWS",
        "job.generation.system_prompt": "ROWS",
    }


def test_what_was_interpolated_is_not_interpolated_again(tmp_path: Path) -> None:
    environ = {"MODEL": "${OTHER}", "OWNER": "me", "ROWS": "12", "KEY": "k", "OTHER": "wrong"}
    config = AppConfig.load(write(tmp_path, INTERPOLATED), environ=environ)
    changed = config.with_overrides({"job.source.split": "${OTHER}"}, environ=environ)
    assert changed.job is not None
    assert changed.job.model.name == "${OTHER}"
    assert changed.job.generation.system_prompt == "costs ${ROWS} or 12, $5"
    assert changed.job.source.split == "wrong"
    assert changed.interpolated["job.source.split"] == "OTHER"
    assert changed.interpolated["job.model.api_key"] == "KEY"
    gone = config.with_overrides({"job.model.api_key": "other"}, environ=environ)
    assert "job.model.api_key" not in gone.interpolated


def test_a_missing_variable_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        AppConfig.load(
            write(tmp_path, INTERPOLATED.replace("${OWNER}", "${OWNER:-me}")), environ={}
        )
    told = {(problem.path, problem.line): problem.message for problem in caught.value.problems}
    assert "variable MODEL is not set" in told["job.model.name", 2]
    assert "variable ROWS is not set" in told["job.source.max_examples", 5]
    assert "not of the form ${NAME}" in told["job.source.dataset", 4]
    assert len(told) == 6  # and nothing that only follows from these


def test_wire_documents_are_not_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVATE", "of the server")
    assert parse_job(job(metadata={"x": "${PRIVATE}"})).metadata == {"x": "${PRIVATE}"}


def test_a_value_that_is_a_secret_is_not_shown() -> None:
    told = problems_of(
        lambda: parse_job(job(model={"provider": "openai", "api_key_env": "sk-very-secret"}))
    )
    assert "secret" not in told["job.model.api_key_env"]
    told = problems_of(
        lambda: parse_job(job(model={"provider": "openai", "base_url": "http://u:secret@h/"}))
    )
    assert "secret" not in told["job.model.base_url"]
