"""Options of ``spider-scaffold evaluate``, and what needs no box."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spider_scaffold.cli import run
from spider_scaffold.jobfile import FOLDER
from spider_scaffold.judging import Settings, verdict
from spider_scaffold.report import summary
from spider_scaffold.tasks import find_tasks, open_workspace
from spider_sdk.errors import UsageError
from spider_worker.evaluation.verdict import Group, Report
from spider_worker.trajectories.output_file import append, read, read_index
from tests.support.fake_docker import running_engine
from tests.support.trajectories import record, write_run

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    second = record("a", attempt=2, git_patch="right")
    return write_run(tmp_path / "run", [record("a"), second, record("b", n=1), record("c")])


def gather(output: Path, config: Path | None = None, **flags: object) -> Settings:
    names = ("dataset", "split", "workspace", "num_workers", "timeout")
    return Settings.gather(output, config, **{name: flags.get(name) for name in names})  # type: ignore[arg-type]


def test_settings_come_from_flags_then_config_then_metadata(output: Path, tmp_path: Path) -> None:
    assert gather(output) == Settings("SWE-bench/SWE-smith", "train", "docker", 1, 1800.0, False)
    config = tmp_path / "swe.yaml"
    config.write_text("llm_model: m\nworkspace: local\nnum_workers: 3\ntimeout_seconds: 60\n")
    assert gather(output, config) == Settings(
        "SWE-bench/SWE-smith", "train", "local", 3, 60.0, False
    )
    given = gather(output, config, dataset="d.jsonl", split="s", workspace="local", num_workers=5)
    assert given == Settings("d.jsonl", "s", "local", 5, 60.0, True)
    output.with_name("metadata.json").unlink()
    with pytest.raises(UsageError, match="give --dataset"):
        gather(output)


def test_predictions_go_out_and_reports_come_in(
    output: Path, tmp_path: Path, capsys: Capture
) -> None:
    target = tmp_path / "predictions.jsonl"
    assert run(["evaluate", "--input", str(output), "--export", str(target)]) == 0
    (first, second) = map(json.loads, target.read_text().splitlines())
    assert (first["instance_id"], first["model_patch"]) == ("a", "right")
    assert second["instance_id"] == "c"
    assert (tmp_path / "predictions-n1.jsonl").exists()
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"resolved_ids": ["a", "z"], "unresolved_ids": ["b"]}))
    capsys.readouterr()
    assert run(["evaluate", "--input", str(output), "--import", str(report)]) == 0
    out, err = capsys.readouterr()
    assert "taken over from" in out
    assert ": 1 verdict\n" in out
    assert "output.jsonl: 2 instances of the report" in err
    assert "says nothing of 1 instance\n" in err
    found = {(one.instance_id, one.n, one.attempt): one.resolved for one in read(output)}
    assert found == {("a", 0, 1): None, ("a", 0, 2): True, ("b", 1, 1): None, ("c", 0, 1): None}
    arguments = ["evaluate", "--input", str(output), "--import", str(report), "--run", "1"]
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == {"imported": ["b"]}
    assert {one.key: one.resolved for one in read(output)}["b", 1] is False


def test_runs_that_were_kept_from_their_end_go_nowhere(
    output: Path, tmp_path: Path, capsys: Capture
) -> None:
    append(output, record("c", attempt=2, status="llm_error", git_patch=None))
    append(output, record("b", resolved=True))
    target, report = tmp_path / "predictions.jsonl", tmp_path / "report.json"
    assert run(["evaluate", "--input", str(output), "--export", str(target)]) == 0
    named = [json.loads(one)["instance_id"] for one in target.read_text().splitlines()]
    assert named == ["a", "b"]
    assert "left out, kept from their end: 1 run\n" in capsys.readouterr().out
    report.write_text(json.dumps({"resolved_ids": ["a"], "error_ids": ["b"], "ids": ["c"]}))
    assert run(["evaluate", "--input", str(output), "--import", str(report)]) == 0
    entries = read_index(output).latest
    assert [entries[name, 0].resolved for name in "abc"] == [True, True, None]
    report.write_text(json.dumps({"unresolved_ids": ["c"]}))
    assert run(["evaluate", "--input", str(output), "--import", str(report)]) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl is not here; name the file with --dataset"),
        (["--dataset", "bad.jsonl"], "bad.jsonl, line 1: no JSON"),
        (["--dataset", "list.jsonl"], "list.jsonl, line 1: expected an object"),
        (["--dataset", "sent.jsonl"], "repo_source refers to a file on a server"),
        (["--dataset", "other.jsonl"], "none of software tasks"),
        (["--export", "x.jsonl", "--import", "list.jsonl"], "give one of them"),
        (["--import", "empty.json"], "holds no report of a harness"),
        (["--config", "job.yaml"], "is no SWE job"),
    ],
)
def test_what_cannot_be_is_one_clear_error(
    output: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "list.jsonl").write_text("[]\n")
    (tmp_path / "sent.jsonl").write_text('{"repo_source": "input:abc"}\n')
    (tmp_path / "other.jsonl").write_text('{"question": "x"}\n')
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "job.yaml").write_text(
        "job: {model: {provider: vllm, name: m}, source: {dataset: d, field: q}}\n"
    )
    before = output.read_bytes()
    assert run(["evaluate", "--input", str(output), *options]) == 2
    assert said in capsys.readouterr().err
    assert output.read_bytes() == before


def test_a_file_without_records(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "output.jsonl").touch()
    given = ["--input", str(tmp_path / "output.jsonl"), "--dataset", "d.jsonl"]
    assert run(["evaluate", *given]) == 2
    assert "holds no records" in capsys.readouterr().err


def test_only_the_tasks_that_are_asked_for_are_read(tmp_path: Path) -> None:
    rows = [
        {"instance_id": name, "repo": "r", "patch": "", "problem_statement": "p",
         "FAIL_TO_PASS": [], "PASS_TO_PASS": [], "repo_source": source, "base_commit": "c"}
        for name, source in (("a", "repos/a"), ("b", None))
    ]  # fmt: skip
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = find_tasks(str(path), "train", frozenset({"a", "z"}))
    assert list(tasks) == ["a"]
    assert tasks["a"].origin.ref == str(tmp_path / "repos/a"), "relative to the file"


def padded_row(number: int) -> dict[str, Any]:
    return {
        "instance_id": f"t{number}", "repo": "r", "patch": "p", "problem_statement": "p",
        "FAIL_TO_PASS": [], "PASS_TO_PASS": [f"test {number} " * 5_000], "image_name": "i",
    }  # fmt: skip


class PaddedRows:
    """A source of 500 rows of 40 kB each, that holds a batch at a time."""

    def batches(
        self, start: int, stop: int | None, size: int = 256
    ) -> Iterator[list[tuple[int, dict[str, Any]]]]:
        for first in range(0, 500, 10):
            yield [(number, padded_row(number)) for number in range(first, first + 10)]

    def close(self) -> None:
        """Nothing to close."""


@pytest.mark.parametrize("dataset", ["tasks.jsonl", "org/tasks"])
def test_rows_that_are_not_asked_for_are_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with Path("tasks.jsonl").open("w") as file:
        file.writelines(json.dumps(padded_row(number)) + "\n" for number in range(500))
    monkeypatch.setattr("spider_scaffold.tasks.build_source", lambda *_: PaddedRows())
    tracemalloc.start()
    tasks = find_tasks(dataset, "train", frozenset({"t7", "t499"}))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(tasks) == ["t7", "t499"]
    assert most < 5_000_000, "of more than 20 MB"


def test_workspaces(tmp_path: Path) -> None:
    for kind in ("docker", "bwrap", "local"):
        box = open_workspace(kind, tmp_path, owners=tmp_path / "owners", allow_local=True)
        assert box.kind == kind
    with pytest.raises(UsageError, match="not 'cloud'"):
        open_workspace("cloud", tmp_path, owners=tmp_path / "owners", allow_local=True)


def test_containers_of_an_evaluation_that_was_killed_are_swept(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tmp_path / "tasks.jsonl"
    row = {"instance_id": "z", "repo": "r", "patch": "", "problem_statement": "p",
           "FAIL_TO_PASS": [], "PASS_TO_PASS": [], "image_name": "an/image"}  # fmt: skip
    tasks.write_text(json.dumps(row) + "\n")
    with running_engine(tmp_path, monkeypatch) as engine:
        engine.image("an/image")
        owners = output.parent / FOLDER / "owners"
        engine.leave("an/image", "dead", owners)
        elsewhere = engine.leave("an/image", "elsewhere")
        given = ["--dataset", str(tasks), "--workspace", "docker"]
        assert run(["evaluate", "--input", str(output), *given]) == 0
        assert [path.name for path in engine.containers()] == [elsewhere]
    assert "dead" not in [path.name for path in owners.iterdir()]


def test_local_boxes_have_to_be_asked_for_in_so_many_words(
    output: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "tasks.jsonl"
    row = {
        "instance_id": "a", "repo": "r", "patch": "", "problem_statement": "p", "base_commit": "c",
        "FAIL_TO_PASS": ["t"], "PASS_TO_PASS": [], "repo_source": "a",
    }  # fmt: skip
    path.write_text(json.dumps(row) + "\n")
    (tmp_path / "swe.yaml").write_text(f"llm_model: m\nworkspace: local\ndataset: {path}\n")
    given = ["--input", str(output), "--config", str(tmp_path / "swe.yaml")]
    assert run(["evaluate", *given]) == 2
    assert "workspace: local runs an agent's commands" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (Report(True), "resolved"),
        (Report(True, flaky=("t",)), "resolved, flaky: t"),
        (Report(None, error="no box"), "cannot be judged: no box"),
        (Report(None, invalid_task=True, error="x"), "invalid task: x"),
        (Report(False, empty_generation=True), "not resolved: the patch is empty"),
        (Report(False, failed_apply_patch=True), "not resolved: the patch does not apply"),
        (Report(False, test_timeout=True), "not resolved: the tests ran past their time"),
        (
            Report(False, fail_to_pass=Group(failed=tuple("abcd"))),
            "not resolved: a, b, c and 1 more",
        ),
    ],
)
def test_verdicts_in_words(report: Report, said: str) -> None:
    assert verdict(report) == said


def test_the_table(output: Path) -> None:
    append(output, record("d", status="timeout", cost=None))
    append(output, record("e", status="timeout", resolved=False, cost=1.0))
    append(output, {**record("f", resolved=True, cost=1.0), "status": "of_later"})
    assert summary(read_index(output)).lines() == [
        "status     runs  judged  resolved",
        "finished      3       0         -",
        "timeout       2       1         0",
        "of later      1       1         1",
        "all           6       2         1",
        "cost: $3.00, and 1 attempt of unknown cost",
    ]
    nothing = summary(read_index(output.with_name("none")))
    assert nothing.lines() == ["no instance has come to an end"]
