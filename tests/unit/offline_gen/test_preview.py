"""Previewing a job: the real pipeline over a few rows, generating where this machine can."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest

from spider_sdk.cli.main import run
from spider_sdk.config.model import (
    GenerationConfig,
    InputFile,
    JobConfig,
    ModelConfig,
    OnPolicyOptions,
    ProcessorConfig,
    SourceConfig,
    TeacherConfig,
)
from spider_sdk.errors import FatalJobError, NotSupported
from spider_worker.commands.local_preview import preview_job
from spider_worker.settings import WorkerSettings
from tests.support.openai_server import running_server

DEMO = Path(__file__).resolve().parents[3] / "config" / "demo"

SOURCE = """
def pre(row):
    if row["n"] == 1:
        return None
    return f"{row['q']} over {10 // row['n']}"

def post(record):
    return {"answer": record["completion"].upper()}
"""


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"q": f"q{n}", "n": n}) + "\n" for n in range(9)))
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path}


def job(inputs: dict[str, Path], model: ModelConfig, **changes: object) -> JobConfig:
    (digest,) = inputs
    source = SourceConfig("rows.jsonl", field="q", inputs=(InputFile("rows.jsonl", digest),))
    return dataclasses.replace(JobConfig(model, source), **changes)  # type: ignore[arg-type]


def settings(tmp_path: Path) -> WorkerSettings:
    return WorkerSettings(allow_private_urls=True, data_roots=str(DEMO), state=tmp_path / "state")


def test_an_endpoint_is_asked_and_processors_run(tmp_path: Path, inputs: dict[str, Path]) -> None:
    processors = {
        f"{stage}_processor": ProcessorConfig(name=stage, source=SOURCE)
        for stage in ("pre", "post")
    }
    with running_server() as server:
        model = ModelConfig("openai", "m", base_url=server.base_url, api_key_env="KEY")
        made = preview_job(
            job(inputs, model, **processors, generation=GenerationConfig(duplications=4)),
            3, inputs=inputs, secrets={"KEY": "sk-1"}, settings=settings(tmp_path),
        )  # fmt: skip
        assert server.stats()["requests"] == 1
    assert made.skipped is None
    assert made.dropped == [1]
    first, last = made.records
    assert first["error"]["type"] == "ZeroDivisionError"
    assert "in pre" in first["error"]["traceback"]
    assert last == {"id": "2-0", "index": 2, "sample": 0, "answer": "ECHO: Q2 OVER 5"}


def test_without_a_key_prompts_are_shown_and_the_reason_why(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    model = ModelConfig("openai", "m", base_url="http://127.0.0.1:9/v1", api_key_env="KEY")
    post = ProcessorConfig(name="post", source=SOURCE)
    made = preview_job(
        job(inputs, model, post_processor=post), 2, inputs=inputs, secrets={},
        settings=settings(tmp_path),
    )  # fmt: skip
    assert made.skipped is not None
    assert "KEY" in made.skipped
    assert [r["messages"] for r in made.records] == [
        [{"role": "user", "content": "q0"}],
        [{"role": "user", "content": "q1"}],
    ]


def test_a_model_that_is_elsewhere_is_not_downloaded(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    made = preview_job(
        job(inputs, ModelConfig("transformers", "nobody/no-such-model")), 1, inputs=inputs,
        secrets={}, settings=settings(tmp_path),
    )  # fmt: skip
    assert made.skipped == (
        "the model nobody/no-such-model is not on this machine, and preview downloads none"
    )
    assert len(made.records) == 1


def test_a_model_on_this_machine_generates(tmp_path: Path, inputs: dict[str, Path]) -> None:
    made = preview_job(
        job(
            inputs,
            ModelConfig("transformers", "./adder"),
            generation=GenerationConfig({"max_tokens": 4}),
        ),
        2, inputs=inputs, secrets={}, settings=settings(tmp_path),
    )  # fmt: skip
    assert made.skipped is None
    assert all(record["usage"]["completion_tokens"] > 0 for record in made.records)


def test_mistakes_of_the_job_itself_are_errors(tmp_path: Path, inputs: dict[str, Path]) -> None:
    def go(changed: JobConfig) -> None:
        preview_job(changed, 1, inputs=inputs, secrets={}, settings=settings(tmp_path))

    model = ModelConfig("transformers", "./adder")
    with pytest.raises(NotSupported, match="no_such_option"):
        go(job(inputs, model, generation=GenerationConfig({"no_such_option": 1})))
    with pytest.raises(FatalJobError, match="gone"):
        go(job(inputs, model, pre_processor=ProcessorConfig(name="gone", source=SOURCE)))


def training(inputs: dict[str, Path], provider: str, **options: object) -> JobConfig:
    wanted = OnPolicyOptions((TeacherConfig("t"),), max_tokens=4, **options)  # type: ignore[arg-type]
    generation = GenerationConfig(on_policy=True, on_policy_options=wanted)
    parameters = {"lora_alpha": 16, "max_model_len": 64} if provider == "local" else {}
    return job(inputs, ModelConfig(provider, "./adder", parameters), generation=generation)


def test_of_a_training_job_the_student_answers(tmp_path: Path, inputs: dict[str, Path]) -> None:
    made = preview_job(
        training(inputs, "local"), 2, inputs=inputs, secrets={}, settings=settings(tmp_path)
    )
    assert made.skipped is None
    assert [record["prompt"] for record in made.records] == ["q0", "q1"]
    assert all(record["usage"]["completion_tokens"] <= 4 for record in made.records)


@pytest.mark.parametrize(
    ("provider", "options", "why"),
    [
        ("tinker", {}, "Tinker"),
        ("local", {"student_checkpoint_path": "me/adapter"}, "checkpoint"),
    ],
)
def test_a_student_that_is_not_here_says_so(
    tmp_path: Path, inputs: dict[str, Path], provider: str, options: dict[str, str], why: str
) -> None:
    made = preview_job(
        training(inputs, provider, **options),
        1,
        inputs=inputs,
        secrets={},
        settings=settings(tmp_path),
    )
    assert made.skipped is not None
    assert why in made.skipped
    assert [record["prompt"] for record in made.records] == ["q0"]


def spider(*args: str | Path) -> int:
    return run([str(arg) for arg in args])


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Path]) -> Path:
    monkeypatch.setenv("SPIDER_CONFIG", str(tmp_path / "none.toml"))
    monkeypatch.setenv("SPIDER_STATE", str(tmp_path / "state"))
    for name in ("OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "functions.py").write_text(SOURCE)
    path = tmp_path / "job.yaml"
    path.write_text(
        "job:\n"
        "  model: {provider: openai, name: m}\n"
        "  source: {dataset: ./rows.jsonl, field: q}\n"
        "  output: {mode: upload_hf, hf: {repo_id: me/data}}\n"
    )
    return path


def test_the_command_shows_rows_and_fails_where_one_failed(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    with running_server() as server:
        url = f"job.model.base_url={server.base_url}"
        functions = ("--pre-processor", "functions.py:pre", "--post-processor", "functions.py:post")
        assert spider("preview", config, "-n", "3", "--set", url, *functions) == 1
    shown = capsys.readouterr()
    assert "ZeroDivisionError" in shown.out
    assert 'return f"{row' in shown.out  # the user's own line
    assert "answer: ECHO: Q2 OVER 5" in shown.out
    assert "row 1: dropped by a processor" in shown.out
    assert "1 of 3 rows failed" in shown.err


def test_the_command_renders_prompts_without_a_key(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert spider("preview", config, "-n", "2", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("prompt") for line in lines] == ["q0", "q1", None]
    assert "completion" not in lines[0]
    assert lines[2]["generated"] is False
    assert "OPENAI_API_KEY" in lines[2]["reason"]


def test_the_command_tells_mistakes_as_the_job_would(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert spider("preview", config, "--set", "job.source.field=nope") == 2
    assert "'nope' is no column of 'rows.jsonl'; it has q, n" in capsys.readouterr().err


def test_nothing_is_left_behind(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    preview_job(
        job(inputs, ModelConfig("transformers", "nobody/x")), 1, inputs=inputs, secrets={},
        settings=settings(tmp_path), skip="no",
    )  # fmt: skip
    assert os.listdir(tmp_path / "temporary") == []
