"""A whole job in containers, as far as a ``docker`` without an engine has them."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from spider_sdk.errors import EngineUnavailable
from tests.contract.swe_agent.conftest import Job, Warm, mending
from tests.support.fake_docker import FakeDocker, running_engine
from tests.support.swe_repos import SweRepo

IMAGE = "jyangballin/swesmith.x86_64.tests_1776_calc.1"


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDocker]:
    with running_engine(tmp_path, monkeypatch) as fake:
        yield fake


class ImageJob(Job):
    """On rows of SWE-smith's."""

    def _inputs(self) -> dict[str, Path]:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / "tasks.jsonl"
        (repo,) = self.repos
        kept = ("instance_id", "repo", "patch", "FAIL_TO_PASS", "PASS_TO_PASS")
        row = {name: repo.row()[name] for name in kept} | {
            "image_name": IMAGE,
            "problem_statement": f"{repo.problem_statement}\n[[part:{repo.folder.name}]]",
        }
        path.write_text(json.dumps(row) + "\n")
        return {hashlib.sha256(path.read_bytes()).hexdigest(): path}


def test_an_agent_mends_it_in_its_image_and_what_the_dead_left_is_swept(
    folder: Path, warm: Warm, repos: list[SweRepo], python: str, engine: FakeDocker
) -> None:
    repo = next(repo for repo in repos if repo.folder.name == "calc")
    tree = engine.image(IMAGE)
    clone(repo, tree)
    engine.give_testbed(tree)
    owners = warm.state / "swe-agent" / "owners"
    engine.leave(IMAGE, "dead", owners)
    elsewhere = engine.leave(IMAGE, "elsewhere")

    job = ImageJob(folder, warm, [repo], python, {"calc": mending(repo)})
    (record,) = job.run(workspace="docker", evaluate=True)
    assert (record["status"], record["resolved"]) == ("finished", True), record["report"]
    seen = next(m for m in record["messages"] if m["role"] == "tool")["content"]
    text = seen if isinstance(seen, str) else "".join(part["text"] for part in seen)
    assert "Start here" in text
    assert repo.marker not in text
    assert [path.name for path in engine.containers()] == [elsewhere]
    assert not (owners / "dead").exists()
    assert "the-real-key" not in json.dumps([engine.calls(), engine.environments()])


def program(folder: Path, text: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def clone(repo: SweRepo, tree: Path) -> None:
    subprocess.run(["git", "clone", "-q", repo.folder, tree], check=True)
    subprocess.run(["git", "checkout", "-q", repo.base_commit], cwd=tree, check=True)


def test_an_interpreter_that_would_hide_the_image_is_said_before_anything_begins(
    folder: Path,
    warm: Warm,
    repos: list[SweRepo],
    python: str,
    tmp_path: Path,
    engine: FakeDocker,
) -> None:
    systems = program(
        tmp_path,
        f"""case "$3" in
*sys.base_prefix*) echo '["{tmp_path}", "/usr"]' ;;
*) exec {python} "$@" ;;
esac""",
    )
    job = ImageJob(folder, warm, repos[:1], systems, {})
    with pytest.raises(EngineUnavailable, match="needs /usr of this host"):
        job.run(workspace="docker")
    assert job.model is not None
    assert not job.model.requests
    assert not engine.calls()


def test_an_interpreter_that_does_not_run_in_the_image_is_said_before_anything_begins(
    folder: Path,
    warm: Warm,
    repos: list[SweRepo],
    python: str,
    tmp_path: Path,
    engine: FakeDocker,
) -> None:
    clone(repos[0], engine.image(IMAGE))
    newer = program(
        tmp_path, f'[ -e /.init ] && echo "no GLIBC_2.99 here" && exit 1\nexec {python} "$@"'
    )
    job = ImageJob(folder, warm, repos[:1], newer, {repos[0].folder.name: []})
    with pytest.raises(EngineUnavailable, match=f"{newer} does not run in the image {IMAGE} of"):
        job.run(workspace="docker")
    assert job.model is not None
    assert not job.model.requests
    assert not engine.containers()
