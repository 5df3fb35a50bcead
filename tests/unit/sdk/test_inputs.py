"""Local data becomes inputs: what is found, what is skipped, what is sent."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.errors import ApiError, ConfigError
from spider_sdk.inputs import localise, upload
from spider_sdk.transport import Transport
from tests.support.scripted_server import ScriptedServer, answer_json, problem


def job(dataset: str, **source: Any) -> dict[str, Any]:
    return {"model": {"name": "m"}, "source": {"dataset": dataset, **source}}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "./rows.jsonl", "rows.csv.gz", "rows.parquet"])
def test_a_local_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("rows")
    given = job(name, split="train")
    local = localise(given)
    base = Path(name).name
    assert local.job["source"] == {
        "dataset": base,
        "split": "train",
        "inputs": [{"name": base, "sha256": sha("rows")}],
    }
    assert local.files[0].size == 4
    assert given == job(name, split="train")


def test_the_path_does_not_leave_this_machine(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("rows")
    local = localise(job(str(tmp_path / "rows.jsonl")))
    assert str(tmp_path) not in str(local.job)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.jsonl").write_text("rows")
    assert [file.name for file in localise(job("~/data")).files] == ["rows.jsonl"]


def test_a_name_on_the_hub_stays() -> None:
    given = job("openai/gsm8k", options={"data_files": "data/train.parquet"})
    assert localise(given).files == ()
    assert localise(given).job == given


def test_a_folder_says_what_it_skips(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tmp_path / "data"
    for name in ("train/a.jsonl", "test/a.jsonl", ".git/x.jsonl", ".hidden.jsonl", "README.md"):
        path = data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (data / "link.jsonl").symlink_to(data / "train/a.jsonl")
    (data / "linked").symlink_to(tmp_path)
    with caplog.at_level(logging.WARNING, "spider_sdk"):
        local = localise(job("data"))
    assert [file.name for file in local.files] == ["test-a.jsonl", "train-a.jsonl"]
    assert local.files[0].sha256 == sha("test/a.jsonl")
    for skipped in (".git (hidden)", ".hidden.jsonl (hidden)", "README.md", "link.jsonl (a sym"):
        assert skipped in caplog.text
    assert "linked (a symbolic link)" in caplog.text


@pytest.mark.parametrize("name", ["./none", "../none", "/none/here", "~/none", "none.jsonl"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no file or folder") as caught:
        localise(job(name))
    assert caught.value.problems[0].path == "job.source.dataset"


def test_an_empty_folder_that_was_meant(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    with pytest.raises(ConfigError, match="holds no data file"):
        localise(job("./gsm8k"))
    assert localise(job("gsm8k")).files == ()


def test_data_files_by_split_list_and_glob(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b1.jsonl", "b2.jsonl"):
        (tmp_path / name).write_text(name)
    files = {"train": ["a.jsonl"], "test": "./b*.jsonl"}
    local = localise(job("json", options={"data_files": files, "field": "data"}))
    assert local.job["source"]["options"] == {"field": "data"}
    assert local.job["source"]["dataset"] == "json"
    names = [file.name for file in local.files]
    assert names == ["train-a.jsonl", "test-b1.jsonl", "test-b2.jsonl"]
    several = localise(job("json", options={"data_files": ["b1.jsonl", "b2.jsonl"]}))
    assert [file.name for file in several.files] == ["train-b1.jsonl", "train-b2.jsonl"]
    one = localise(job("json", options={"data_files": "a.jsonl"}))
    assert [file.name for file in one.files] == ["a.jsonl"]


def test_data_files_of_a_repository_on_the_hub_stay(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("mine")
    given = job("owner/data", options={"data_files": {"train": "a.jsonl"}})
    assert localise(given).job == given


@pytest.mark.parametrize(
    ("files", "path", "told"),
    [
        ({"train": ["no.jsonl"]}, ".train.0", "there is no file"),
        ("hf://datasets/x/y.jsonl", "", "a file on this machine"),
        ({"extra": "a.jsonl"}, "", "splits test, train, validation, not extra"),
        ({"test": "a.jsonl"}, ".test", "one file alone is the split train"),
    ],
)
def test_data_files_that_cannot_go(tmp_path: Path, files: Any, path: str, told: str) -> None:
    (tmp_path / "a.jsonl").write_text("a")
    with pytest.raises(ConfigError, match=told) as caught:
        localise(job("json", options={"data_files": files}))
    assert caught.value.problems[0].path == "job.source.options.data_files" + path


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("one/a.jsonl", "two/a.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    with pytest.raises(ConfigError, match="rename one"):
        localise(job("json", options={"data_files": ["one/a.jsonl", "two/a.jsonl"]}))


def test_formats_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / "data" / name).write_text(name)
    with pytest.raises(ConfigError, match=r"several formats \(a\.jsonl, b\.csv\)"):
        localise(job("data"))


def test_only_what_is_missing_is_sent(
    tmp_path: Path, server: ScriptedServer, connect: Callable[..., Transport]
) -> None:
    for name, text in (("a.jsonl", "old"), ("b.jsonl", "new"), ("c.jsonl", "new")):
        (tmp_path / name).write_text(text)
    server.on("HEAD", f"/v1/inputs/{sha('old')}", answer_json({}))
    server.on("PUT", f"/v1/inputs/{sha('new')}", problem(503, "busy"), answer_json({}, 201))
    sent = upload(connect(), localise(job(str(tmp_path))).files)
    assert sent == 3
    puts = [seen for seen in server.seen if seen.method == "PUT"]
    assert [(seen.path, seen.body) for seen in puts] == [(f"/v1/inputs/{sha('new')}", b"new")] * 2


def test_a_refused_upload_is_told(
    tmp_path: Path, server: ScriptedServer, connect: Callable[..., Transport]
) -> None:
    (tmp_path / "a.jsonl").write_text("x")
    server.on("PUT", f"/v1/inputs/{sha('x')}", problem(413, "inputs may have 5 MB"))
    with pytest.raises(ApiError, match="5 MB"):
        upload(connect(), localise(job("a.jsonl")).files)
