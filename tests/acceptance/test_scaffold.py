"""``spider-scaffold openhands`` as a person runs it: real agents on a fleet of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.errors import EngineUnavailable
from spider_worker.agents.interpreter import agent_python
from spider_worker.fleet.keys import ApiKeys
from spider_worker.trajectories.output_file import read, read_index
from tests.support.agent_model import AgentModel, running_model
from tests.support.api_server import ApiServer
from tests.support.fleet_harness import eventually
from tests.support.fleet_harness import start as start_fleet
from tests.support.swe_repos import SweRepo, make_repos, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300


def _no_agents() -> str | None:
    try:
        agent_python(os.environ.get("SPIDER_AGENT_PYTHON"))
    except EngineUnavailable as error:
        return error.message
    return None


pytestmark = pytest.mark.skipif(_no_agents() is not None, reason=str(_no_agents()))


def edit(patch: str) -> dict[str, Any]:
    """A turn in which the agent applies a patch by its terminal."""
    return {"call": "terminal", "args": {"command": f"git apply - <<'END'\n{patch}\nEND"}}


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> list[SweRepo]:
    made = make_repos(tmp_path_factory.mktemp("repos"))
    return [repo for repo in made if repo.folder.name in ("calc", "spaces")]


@pytest.fixture
def model(repos: list[SweRepo]) -> Iterator[AgentModel]:
    """The first instance is mended, the second one's agent does nothing."""
    mended, left = repos
    parts = {
        mended.folder.name: [edit(mended.gold_patch)],
        left.folder.name: [{"call": "terminal", "args": {"command": "ls"}}],
    }
    with running_model(parts) as model:
        yield model


@pytest.fixture
def config(repos: list[SweRepo], model: AgentModel, tmp_path: Path) -> Path:
    dataset = write_jsonl(tmp_path / "tasks.jsonl", repos)
    rows = [json.loads(line) for line in dataset.read_text("utf-8").splitlines()]
    for row, repo in zip(rows, repos, strict=True):
        row["problem_statement"] += f" [[part:{repo.folder.name}]]"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "swe.yaml"
    path.write_text(
        f"dataset: {dataset}\n"
        "llm_model: scripted\n"
        f"llm_base_url: {model.base_url}\n"
        "llm_api_key_env: MODEL_KEY\n"
        "input_cost_per_token: 0.0001\n"
        "output_cost_per_token: 0.001\n"
        "workspace: bwrap\n"
        "num_workers: 2\n"
        "max_iterations: 10\n"
        "timeout_seconds: 120\n"
        "evaluate: true\n"
        f"eval_output_dir: {tmp_path / 'out'}\n"
    )
    return path


def environment() -> dict[str, str]:
    mine = {"SPIDER_API_KEY"}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in mine or not name.startswith("SPIDER_")
    }
    given = {"MODEL_KEY": "mk-1", "SPIDER_CONFIG": "/nonexistent"}
    return kept | given | agents()


def agents() -> dict[str, str]:
    """Where this test run's agents are, for who starts a worker."""
    named = os.environ.get("SPIDER_AGENT_PYTHON")
    return {"SPIDER_AGENT_PYTHON": named} if named else {}


def start(config: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "spider_scaffold.cli", "openhands", "--config", str(config)]
    return subprocess.Popen(
        [*command, "--json", *options],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, out[-4000:] + err[-4000:]
    return [json.loads(line) for line in out.splitlines()]


def test_agents_fill_a_tree_which_is_judged_and_left_alone_when_whole(
    config: Path, repos: list[SweRepo], model: AgentModel, tmp_path: Path
) -> None:
    documents = finish(start(config))
    assert {"redis", "api", "worker-1"} <= {one.get("part") for one in documents}
    ended = [one["data"] for one in documents if one.get("code") == "instance.ended"]
    assert {one["instance"]: one["status"] for one in ended} == {
        repos[0].instance_id: "finished",
        repos[1].instance_id: "empty_patch",
    }
    tree = tmp_path / "out/tasks-train/CodeActAgent/scripted_maxiter_10"
    assert documents[-1]["output"] == str(tree / "output.jsonl")
    assert documents[-1]["summary"]["resolved"] == 1
    records = {one.instance_id: one for one in read(tree / "output.jsonl")}
    assert {name: one.resolved for name, one in records.items()} == {
        repos[0].instance_id: True,
        repos[1].instance_id: False,
    }
    first = records[repos[0].instance_id]
    assert first.messages[0]["role"] == "system"
    assert first.cost == pytest.approx(first.metrics["turns"] * 0.02)
    assert set(model.keys) == {"Bearer mk-1"}
    for repo in repos:
        assert (tree / f"infer_logs/instance_{repo.instance_id}.log").is_file()
    assert json.loads((tree / "metadata.json").read_text())["max_iterations"] == 10
    assert sorted(path.name for path in (tree / ".spider").iterdir()) == ["job.json", "lock"]
    assert "mk-1" not in (tree / "output.jsonl").read_text("utf-8")

    asked = len(model.requests)
    again = finish(start(config))
    assert [one for one in again if "part" in one] == []
    assert len(model.requests) == asked

    # Further runs of the same instances leave the first ones as they are.
    before = (tree / "output.jsonl").read_bytes()
    more = finish(start(config, "--set", "n_attempts=2"))
    begun = [one["data"] for one in more if one.get("code") == "instance.started"]
    assert sorted((one["instance"], one["n"]) for one in begun) == sorted(
        (repo.instance_id, 1) for repo in repos
    )
    assert (tree / "output.jsonl").read_bytes().startswith(before)
    assert (len(read_index(tree / "output.jsonl").latest), len(model.requests)) == (4, 2 * asked)


def test_ctrl_c_stops_the_fleet_and_the_same_command_goes_on(
    config: Path, repos: list[SweRepo], model: AgentModel, tmp_path: Path
) -> None:
    model.parts[repos[1].folder.name] = [{"hang": True}]
    process = start(config)
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("code") == "unit.committed":
            break
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, out[-4000:]
    assert (
        "go on with: spider-scaffold openhands"
        in json.loads(out.splitlines()[-1])["error"]["message"]
    )
    tree = tmp_path / "out/tasks-train/CodeActAgent/scripted_maxiter_10"
    assert (tree / ".spider/fleet").is_dir()

    model.parts[repos[1].folder.name] = []
    finish(start(config))
    index = read_index(tree / "output.jsonl")
    assert index.latest.keys() == index.done == {(repo.instance_id, 0) for repo in repos}
    mended = [body for body in model.requests if "part:calc" in json.dumps(body["messages"])]
    assert len(mended) == 2, "what was done was not run again"
    assert not (tree / ".spider/fleet").exists()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a real API in front of a fleet with a worker for agents, whose key clients
    have in their environment."""
    folder = tmp_path / "fleet"
    folder.mkdir()
    for harness in start_fleet(folder, SPIDER_LEASE="15", **agents()):
        harness.worker("-Q", "swe-agent")
        _, key = ApiKeys(harness.fleet.redis, harness.fleet.secret_box).create("me")
        monkeypatch.setenv("SPIDER_API_KEY", key)
        with ApiServer(harness.fleet.settings, folder, ALLOW_PRIVATE_URLS="true") as api:
            yield api.base_url


def test_on_a_server_the_job_goes_on_without_its_client_and_the_tree_is_caught_up(
    config: Path, repos: list[SweRepo], model: AgentModel, tmp_path: Path, server: str
) -> None:
    model.parts[repos[1].folder.name] = [{"gate": True, "text": "It is fine as it is."}]
    tree = tmp_path / "out/tasks-train/CodeActAgent/scripted_maxiter_10"
    process = start(config, "--server", server)
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("code") == "unit.committed":
            break
    # What has ended is in the tree while the rest is at work.
    eventually(lambda: (tree / "output.jsonl").is_file(), "the first instance in the tree")
    assert [one.instance_id for one in read(tree / "output.jsonl")] == [repos[0].instance_id]
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=SECONDS)
    said = json.loads(out.splitlines()[-1])["error"]["message"]
    assert re.search(rf"job \S+ goes on at {server}", said), said
    assert not (tree / ".spider/fleet").exists()

    model.gate.set()
    documents = finish(start(config, "--server", server))
    assert not any("part" in one for one in documents)
    assert documents[-1]["summary"]["resolved"] == 1
    index = read_index(tree / "output.jsonl")
    assert index.done == {(repo.instance_id, 0) for repo in repos}
    for repo in repos:
        assert (tree / f"infer_logs/instance_{repo.instance_id}.log").is_file()
    metadata = json.loads((tree / "metadata.json").read_text())
    assert metadata["max_iterations"] == 10
    assert {"openhands-sdk", "openhands-tools"} <= metadata["details"].keys()
    begun = [json.dumps(body["messages"]) for body in model.requests if len(body["messages"]) == 2]
    for repo in repos:
        assert sum(f"part:{repo.folder.name}" in text for text in begun) == 1
    assert set(model.keys) == {"Bearer mk-1"}
