"""A set of software tasks on the Hub, as jobs and evaluations read it by its name."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from spider_worker.swe_tasks.normalise import SMITH_TEST_CMD
from tests.support.hub_emulator import READ_TOKEN, WRITE_TOKEN, HubEmulator
from tests.support.hub_loader import hub_environment

# HF_ENDPOINT is read when the library is imported, so each is asked in a process of its own.
OF_A_JOB = """
import asyncio, dataclasses, json, sys
from pathlib import Path
from spider_sdk.config.model import SweConfig
from spider_worker.pipelines.local import LocalContext, LocalStore
from spider_worker.pipelines.swe_agent.build import real_parts
from spider_worker.settings import WorkerSettings

options, token, folder = json.loads(sys.argv[1])
ctx = LocalContext(
    LocalStore(Path(folder)), SweConfig(llm_model="m", **options), secrets={"HF_TOKEN": token}
)
tasks = asyncio.run(real_parts(WorkerSettings(state=Path(folder))).tasks(ctx))
print(json.dumps([dataclasses.asdict(task) for task in tasks]))
"""
OF_AN_EVALUATION = """
import dataclasses, json, sys
from spider_scaffold.tasks import find_tasks

dataset, split, instances = json.loads(sys.argv[1])
tasks = find_tasks(dataset, split, frozenset(instances))
assert all(key == task.instance_id for key, task in tasks.items())
print(json.dumps([dataclasses.asdict(task) for task in tasks.values()]))
"""


def row(number: int, repo: str = "oauthlib__oauthlib.1fd52536") -> dict[str, Any]:
    return {
        "instance_id": f"{repo}.combine_file__{number:08d}",
        "patch": f"diff --git a/x b/x\n# fault {number}\n",
        "FAIL_TO_PASS": [f"tests/test_a.py::test_{number}"],
        "PASS_TO_PASS": [f"tests/test_a.py::test_b[{case}]" for case in range(number)],
        "image_name": f"jyangballin/swesmith.x86_64.{repo.replace('__', '_1776_')}",
        "repo": f"swesmith/{repo}",
        # The public set has rows without, which are no tasks.
        "problem_statement": f"Case {number} is broken." if number % 4 else "",
    }


TRAIN = [*(row(number) for number in range(8)), row(9, "pylint-dev__astroid.b114f6b5")]
TEST = [row(21)]


@pytest.fixture
def dataset(hub: HubEmulator, repo_id: str) -> str:
    """A private set in the shape of SWE-smith."""
    api = HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)
    api.create_repo(repo_id, repo_type="dataset", private=True)
    operations = []
    for split, rows in (("train", TRAIN), ("test", TEST)):
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), file)
        path = f"data/{split}-00000-of-00001.parquet"
        operations.append(CommitOperationAdd(path, file.getvalue()))
    api.create_commit(repo_id, operations, commit_message="tasks", repo_type="dataset")
    return repo_id


def tasks(hub: HubEmulator, home: Path, code: str, asked: Any, **env: str) -> list[dict[str, Any]]:
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asked)],
        env={**hub_environment(hub.endpoint, home), **env},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found: list[dict[str, Any]] = json.loads(run.stdout)
    return found


def check(found: dict[str, Any], row: dict[str, Any]) -> None:
    assert found["row"] == row
    assert found["bug_patch"] == row["patch"]
    assert found["origin"] == {"kind": "image", "ref": row["image_name"]}
    assert found["problem_statement"] == row["problem_statement"]
    assert (found["fail_to_pass"], found["pass_to_pass"]) == (
        row["FAIL_TO_PASS"],
        row["PASS_TO_PASS"],
    )
    assert found["test_cmd"] == SMITH_TEST_CMD


def test_a_job_loads_its_tasks_by_the_name_of_their_set(
    hub: HubEmulator, dataset: str, tmp_path: Path
) -> None:
    def load(**options: Any) -> list[dict[str, Any]]:
        asked = [{"dataset": dataset, **options}, READ_TOKEN, str(tmp_path / "job")]
        return tasks(hub, tmp_path / "hf", OF_A_JOB, asked)

    found = load(instance_filter="oauthlib__", max_instances=4)
    assert len(found) == 4
    for one, wanted in zip(found, (TRAIN[n] for n in (1, 2, 3, 5)), strict=True):
        check(one, wanted)
    (other,) = load(split="test", seed=1)
    check(other, TEST[0])


def test_an_evaluation_finds_its_tasks_by_the_name_of_their_set(
    hub: HubEmulator, dataset: str, tmp_path: Path
) -> None:
    wanted = [TRAIN[3], TRAIN[8]]
    asked = [dataset, "train", [*(one["instance_id"] for one in wanted), TEST[0]["instance_id"]]]
    found = tasks(hub, tmp_path / "hf", OF_AN_EVALUATION, asked, HF_TOKEN=READ_TOKEN)
    assert len(found) == 2
    for one, row in zip(found, wanted, strict=True):
        check(one, row)
