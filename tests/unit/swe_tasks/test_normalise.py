"""Rows of each set as tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.errors import FatalJobError
from spider_worker.swe_tasks.base import Origin, Task
from spider_worker.swe_tasks.normalise import SMITH_TEST_CMD, form_of, image_of, to_task
from tests.support.swe_repos import make_repos, write_jsonl

SMITH: dict[str, Any] = {
    "instance_id": "oauthlib__oauthlib.1fd52536.combine_file__09vlzwgc",
    "patch": "diff --git a/x b/x\n",
    "FAIL_TO_PASS": ["tests/test_a.py::test_b"],
    "PASS_TO_PASS": ["tests/test_a.py::test_c", "tests/test_a.py::test_d"],
    "image_name": "jyangballin/swesmith.x86_64.oauthlib_1776_oauthlib.1fd52536",
    "repo": "swesmith/oauthlib__oauthlib.1fd52536",
    "problem_statement": "It is broken.",
}
BENCH: dict[str, Any] = {
    "repo": "astropy/astropy",
    "instance_id": "astropy__Astropy-12907",
    "base_commit": "d16bfe05a744909de4b27f5875fe0d4ed41ce607",
    "patch": "gold\n",
    "test_patch": "tests\n",
    "problem_statement": "Wrong.",
    "hints_text": "",
    "created_at": "2022-03-03T15:14:54Z",
    "version": "4.3",
    "FAIL_TO_PASS": '["a.py::test_x[1-\\"q\\"]"]',
    "PASS_TO_PASS": "[]",
    "environment_setup_commit": "298ccb478e6bf092953bca67a3d29dc6c35f6752",
}
GYM = {
    key: value
    for key, value in (BENCH | {"FAIL_TO_PASS": ["t"], "PASS_TO_PASS": ["u"]}).items()
    if key != "environment_setup_commit"
}
REBENCH = BENCH | {
    "FAIL_TO_PASS": ["t"],
    "PASS_TO_PASS": [],
    "docker_image": "swerebench/sweb.eval.x86_64.astropy_1776_astropy-12907",
    "install_config": {"python": "3.9", "test_cmd": "pytest --no-header -rA"},
}


def task(row: dict[str, Any]) -> Task:
    made = to_task(row, form=form_of(row))
    assert made is not None
    assert made.row is row
    return made


def test_swe_smith_puts_the_fault_in() -> None:
    made = task(SMITH)
    assert (made.bug_patch, made.gold_patch, made.test_patch) == (SMITH["patch"], None, "")
    assert made.base_commit is None
    assert made.origin == Origin("image", SMITH["image_name"])
    assert made.fail_to_pass == ("tests/test_a.py::test_b",)
    assert made.pass_to_pass == ("tests/test_a.py::test_c", "tests/test_a.py::test_d")
    assert made.test_cmd == SMITH_TEST_CMD


@pytest.mark.parametrize("statement", ["", " \n", None])
def test_a_row_without_a_problem_is_no_task(statement: str | None) -> None:
    assert to_task(SMITH | {"problem_statement": statement}, form="smith") is None


def test_swe_bench_has_the_fault_and_an_image_by_its_id() -> None:
    made = task(BENCH)
    assert (made.bug_patch, made.gold_patch, made.test_patch) == ("", "gold\n", "tests\n")
    assert made.base_commit == BENCH["base_commit"]
    assert made.image_name == "swebench/sweb.eval.x86_64.astropy_1776_astropy-12907:latest"
    assert made.fail_to_pass == ('a.py::test_x[1-"q"]',)
    assert made.pass_to_pass == ()
    assert made.test_cmd is None


def test_swe_gym_is_told_by_its_columns() -> None:
    made = task(GYM)
    assert made.image_name == "xingyaoww/sweb.eval.x86_64.astropy_s_astropy-12907:latest"
    assert (made.fail_to_pass, made.pass_to_pass) == (("t",), ("u",))


@pytest.mark.parametrize("as_text", [False, True])
def test_swe_rebench_names_its_image_and_its_command(as_text: bool) -> None:
    row = dict(REBENCH)
    if as_text:
        row["install_config"] = json.dumps(row["install_config"])
    made = task(row)
    assert made.origin == Origin("image", REBENCH["docker_image"])
    assert made.test_cmd == "pytest --no-header -rA"
    assert made.gold_patch == "gold\n"
    bare = task(REBENCH | {"docker_image": None, "image_name": "an/image", "install_config": None})
    assert (bare.image_name, bare.test_cmd) == ("an/image", None)
    none = task(REBENCH | {"docker_image": None})
    assert none.image_name == "swerebench/sweb.eval.x86_64.astropy_1776_astropy-12907:latest"
    several = task(REBENCH | {"install_config": {"test_cmd": ["a", "b"]}})
    assert several.test_cmd == "a && b"


def test_images_have_names_that_a_registry_takes() -> None:
    for collection in ("bench", "gym", "rebench"):
        image = image_of("A__B-1", collection)
        assert image == image.lower()
        assert "__" not in image


def test_the_offline_form_comes_from_a_file(tmp_path: Path) -> None:
    repos = make_repos(tmp_path / "repos")
    path = write_jsonl(tmp_path / "tasks.jsonl", repos)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert {form_of(row) for row in rows} == {"offline"}
    for number, (repo, row) in enumerate(zip(repos, rows, strict=True)):
        made = task(row)
        assert made.bug_patch == repo.bug_patch
        assert made.gold_patch == (None if repo.bug_patch else repo.gold_patch)
        assert made.test_patch == repo.test_patch
        assert made.setup_cmds == repo.setup_cmds
        assert (made.base_commit, made.test_cmd) == (repo.base_commit, repo.test_cmd)
        kind, where = ("bundle", repo.bundle) if number % 2 else ("dir", repo.folder)
        assert made.origin == Origin(kind, str(where))


def test_an_offline_source_may_be_relative_or_an_address(tmp_path: Path) -> None:
    row = {**SMITH, "image_name": None, "repo_source": "repos/x"}
    made = to_task(row, form="offline", folder=str(tmp_path))
    assert made is not None
    assert made.origin == Origin("dir", str(tmp_path / "repos/x"))
    for address in ("https://example.org/x.git", "git@example.org:x.git"):
        made = to_task({**row, "repo_source": address}, form="offline", folder=str(tmp_path))
        assert made is not None
        assert made.origin == Origin("git", address)
    with pytest.raises(FatalJobError, match=r"repo_source is 'file:///etc/x.git': .* https, http"):
        to_task({**row, "repo_source": "file:///etc/x.git"}, form="offline")


def test_unknown_columns_are_named_with_what_is_expected() -> None:
    with pytest.raises(FatalJobError) as caught:
        form_of(["question", "answer", "instance_id"])
    for word in ("answer, instance_id, question", "FAIL_TO_PASS", "base_commit", "repo_source"):
        assert word in caught.value.message


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (SMITH | {"FAIL_TO_PASS": "not json"}, "FAIL_TO_PASS is 'not json'"),
        (SMITH | {"FAIL_TO_PASS": '{"a": 1}'}, "expected a list of texts"),
        (SMITH | {"PASS_TO_PASS": [1]}, "PASS_TO_PASS"),
        (SMITH | {"patch": ""}, "puts the fault in"),
        (SMITH | {"image_name": None}, "image_name"),
        (SMITH | {"problem_statement": 3}, "problem_statement is 3: expected a text"),
        (SMITH | {"instance_id": None}, "instance_id None"),
        (SMITH | {"repo_source": ""}, "repo_source"),
        (REBENCH | {"install_config": "{"}, "install_config"),
    ],
)
def test_what_a_column_cannot_hold_is_named(row: dict[str, Any], said: str) -> None:
    with pytest.raises(FatalJobError) as caught:
        task(row)
    assert said in caught.value.message
