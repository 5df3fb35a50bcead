"""Local tasks of a SWE job: the file, the repositories that its rows name, and what goes wrong."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.config import parse_job
from spider_sdk.config.model import SweConfig
from spider_sdk.errors import ConfigError
from spider_sdk.inputs import localise
from spider_sdk.localfiles import Localised


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip()


def repository(folder: Path, text: str = "one") -> str:
    """A repository with one commit, whose id is returned."""
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet")
    (folder / "code.py").write_text(text)
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", text)
    return git(folder, "rev-parse", "HEAD")


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def found(dataset: str | Path, folder: Path) -> Localised:
    folder.mkdir(exist_ok=True)
    return localise({"swe": {"llm_model": "m", "dataset": str(dataset)}}, folder)


def uploaded_rows(local: Localised) -> list[dict[str, Any]]:
    return [json.loads(line) for line in local.files[0].path.read_text().splitlines()]


def complaints(dataset: str | Path, folder: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        found(dataset, folder)
    assert {problem.path for problem in caught.value.problems} == {"dataset"}
    return [problem.message for problem in caught.value.problems]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return tmp_path / "made"


def test_a_name_on_the_hub_stays(made: Path) -> None:
    document = {"swe": {"llm_model": "m", "dataset": "SWE-bench/SWE-smith"}}
    assert localise(document, made) == Localised(document, ())
    assert localise({"swe": {"llm_model": "m"}}, made).files == ()


def test_the_file_of_runs_to_leave_out_travels_too(tmp_path: Path, made: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text('["a", 0]\n')
    tasks = write_rows(tmp_path / "set/tasks.jsonl", {"instance_id": "a"})
    document = {"swe": {"llm_model": "m", "leave_out": str(path)}}
    local = localise(document, made)
    assert [file.path for file in local.files] == [path]
    assert local.job["swe"]["leave_out"] == "tasks.jsonl"
    assert "dataset" not in local.job["swe"]
    assert [one["name"] for one in local.job["swe"]["inputs"]] == ["tasks.jsonl"]
    document["swe"]["dataset"] = str(tasks)
    swe = localise(document, made).job["swe"]
    assert (swe["dataset"], swe["leave_out"]) == ("tasks.jsonl", "_tasks.jsonl")
    assert [one["name"] for one in swe["inputs"]] == ["tasks.jsonl", "_tasks.jsonl"]
    path.unlink()
    with pytest.raises(ConfigError, match="leave_out"):
        localise(document, made)


def test_a_file_without_repositories_goes_as_it_is(tmp_path: Path, made: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_bytes('{"instance_id":  "a","x": "ü"}\n\n{"instance_id": "b"}'.encode())
    local = found(path, made)
    (file,) = local.files
    assert file.path == path
    assert local.job["swe"]["dataset"] == "tasks.jsonl"
    assert local.job["swe"]["inputs"] == [{"name": "tasks.jsonl", "sha256": file.sha256}]


def test_repositories_travel_as_bundles_and_are_named_by_content(
    tmp_path: Path, made: Path
) -> None:
    one = repository(tmp_path / "data/repos/one")
    repository(tmp_path / "elsewhere/one", "two")
    git(tmp_path, "clone", "--quiet", "--bare", str(tmp_path / "data/repos/one"), "bare.git")
    ready = tmp_path / "data/ready.bundle"
    git(tmp_path / "elsewhere/one", "bundle", "create", "--quiet", str(ready), "HEAD")
    rows = [
        {"instance_id": "relative", "repo_source": "repos/one", "base_commit": one},
        {"instance_id": "again", "repo_source": "./repos/../repos/one"},
        {"instance_id": "absolute", "repo_source": str(tmp_path / "elsewhere/one"), "n": 1e3},
        {"instance_id": "bundle", "repo_source": "ready.bundle"},
        {"instance_id": "bare", "repo_source": "../bare.git"},
        {"instance_id": "address", "repo_source": "https://git.example/r.git"},
        {"instance_id": "ssh", "repo_source": "git@git.example:r.git"},
        {"instance_id": "image", "image_name": "i", "text": "ü\u2028"},
    ]
    local = found(write_rows(tmp_path / "data/tasks.jsonl", *rows), made)
    sent = uploaded_rows(local)
    assert [row["instance_id"] for row in sent] == [row["instance_id"] for row in rows]
    references = {row["instance_id"]: row.get("repo_source") for row in sent}
    assert references["relative"] == references["again"]
    for name in ("address", "ssh", "image"):
        assert references[name] == next(r for r in rows if r["instance_id"] == name).get(
            "repo_source"
        )
    assert [{**a, "repo_source": 0} for a in sent] == [{**b, "repo_source": 0} for b in rows]
    assert str(tmp_path) not in json.dumps([sent, local.job])
    by_reference = {f"input:{file.sha256}": file for file in local.files}
    for name in ("relative", "absolute", "bundle", "bare"):
        clone = tmp_path / f"clone-{name}"
        git(tmp_path, "clone", "--quiet", str(by_reference[references[name]].path), str(clone))
        assert (clone / "code.py").read_text() == (
            "two" if name in ("absolute", "bundle") else "one"
        )
    names = [entry["name"] for entry in local.job["swe"]["inputs"]]
    assert len(set(names)) == len(names)
    assert {"tasks.jsonl", "one.bundle", "one-2.bundle", "ready.bundle"} <= set(names)
    job = parse_job(local.job)
    assert isinstance(job, SweConfig)
    assert [(f.name, f.sha256) for f in job.inputs] == [(f.name, f.sha256) for f in local.files]


def test_the_same_repositories_are_the_same_upload(tmp_path: Path, made: Path) -> None:
    repository(tmp_path / "r")
    path = write_rows(tmp_path / "tasks.jsonl", {"repo_source": "r"})
    assert found(path, made).job == found(path, tmp_path / "other").job


def test_a_base_commit_that_no_branch_holds_travels_too(tmp_path: Path, made: Path) -> None:
    repository(tmp_path / "r")
    (tmp_path / "r/code.py").write_text("loose")
    git(tmp_path / "r", "checkout", "--quiet", "--detach")
    git(tmp_path / "r", "commit", "--quiet", "--all", "--message", "loose")
    loose = git(tmp_path / "r", "rev-parse", "HEAD")
    git(tmp_path / "r", "checkout", "--quiet", "-")
    row = {"repo_source": "r", "base_commit": loose}
    local = found(write_rows(tmp_path / "tasks.jsonl", row), made)
    git(tmp_path, "clone", "--quiet", str(local.files[1].path), "clone")
    git(tmp_path / "clone", "checkout", "--quiet", loose)
    assert (tmp_path / "clone/code.py").read_text() == "loose"


def test_what_is_wrong_with_rows_is_told_by_line_and_at_once(tmp_path: Path, made: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "no.bundle").write_text("x")
    repository(tmp_path / "r")
    (tmp_path / "r/inner").mkdir()
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init", "--quiet")
    sources = [
        {"repo_source": "missing"},
        {"repo_source": "plain"},
        {"repo_source": "no.bundle"},
        {"repo_source": "r", "base_commit": "f" * 40},
        {"repo_source": 5},
        {"repo_source": "r/inner"},
        {"repo_source": "empty"},
    ]
    said = complaints(write_rows(tmp_path / "tasks.jsonl", *sources), made)
    told = {int(text.partition("line ")[2].partition(":")[0]): text for text in said}
    assert sorted(told) == [1, 2, 3, 4, 5, 6, 7]
    for line, words in (
        (1, "there is no folder or file"), (2, "is no git repository"), (3, "nor a git bundle"),
        (4, f"has no commit {'f' * 40}"), (5, "no text"), (6, "of its own"),
        (7, "cannot be bundled"),
    ):  # fmt: skip
        assert words in told[line]


def test_a_shallow_clone_is_refused(tmp_path: Path, made: Path) -> None:
    repository(tmp_path / "deep")
    git(tmp_path / "deep", "commit", "--quiet", "--allow-empty", "--message", "more")
    git(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{tmp_path}/deep", "shallow")
    path = write_rows(tmp_path / "tasks.jsonl", {"repo_source": "shallow"})
    assert "--unshallow" in complaints(path, made)[0]


def test_git_of_a_hook_does_not_take_another_repository(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository(tmp_path / "r")
    path = write_rows(tmp_path / "tasks.jsonl", {"repo_source": "r"})
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert len(found(path, made).files) == 2


def test_without_git_it_is_said(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository(tmp_path / "r")
    path = write_rows(tmp_path / "tasks.jsonl", {"repo_source": "r"})
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "git is not installed" in complaints(path, made)[0]


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("missing.jsonl", "there is no file"),
        ("./missing", "there is no file"),
        ("folder/", "there is no file"),
        ("./here", "JSON lines"),
        ("rows.csv", "JSON lines"),
        ("torn.jsonl", "line 2: no JSON"),
        ("list.jsonl", "line 1: expected an object"),
        ("binary.jsonl", "cannot be read"),
    ],
)
def test_a_file_that_holds_no_tasks(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "torn.jsonl").write_text('{}\n{"a": ')
    (tmp_path / "list.jsonl").write_text("[1]")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    if dataset == "folder/":
        dataset = str(tmp_path / "folder")
    assert words in complaints(dataset, made)[0]


def test_inputs_that_are_named_already_stay(tmp_path: Path, made: Path) -> None:
    inputs = [{"name": "tasks.jsonl", "sha256": "0" * 64}]
    document = {"swe": {"llm_model": "m", "dataset": "tasks.jsonl", "inputs": inputs}}
    assert localise(document, made) == Localised(document, ())


def test_an_address_that_no_worker_would_open_is_said_with_its_line(
    tmp_path: Path, made: Path
) -> None:
    rows = [{"repo_source": "https://git.example/r.git"}, {"repo_source": "file:///etc/r.git"}]
    with pytest.raises(ConfigError, match=r"line 2: repo_source: 'file:///etc/r.git': .* by https"):
        found(write_rows(tmp_path / "tasks.jsonl", *rows), made)
