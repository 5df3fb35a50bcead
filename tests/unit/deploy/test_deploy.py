"""deploy/ and the code agree: queues, extras, files and every SPIDER_* variable."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from spider_sdk.jobs import QUEUES

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))
VARIABLE = re.compile(r"\bSPIDER_[A-Z_]+\b")


def known_variables() -> set[str]:
    """The variables of every settings class that ``spider config show`` lists."""
    found = set()
    for where in PROJECT["entry-points"]["spider.settings"].values():
        module, _, name = where.partition(":")
        for field in dataclasses.fields(getattr(importlib.import_module(module), name)):
            found.add(field.metadata["env"] or f"SPIDER_{field.name.upper()}")
    return found


def instructions(path: Path) -> list[tuple[str, str]]:
    """``(INSTRUCTION, arguments)`` of a Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    parts = [line.split(None, 1) for line in lines if line.strip()]
    return [(part[0], part[1]) for part in parts]


def arguments(path: Path, instruction: str) -> list[str]:
    return [value for name, value in instructions(path) if name == instruction]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    return document


def test_there_is_an_image_for_the_api_and_one_a_queue() -> None:
    assert {path.suffix for path in DOCKERFILES} == {".api", *(f".{queue}" for queue in QUEUES)}


@pytest.mark.parametrize("path", [*DOCKERFILES, DEPLOY / "compose.yaml"], ids=lambda p: p.name)
def test_every_variable_is_a_setting(path: Path) -> None:
    used = set(VARIABLE.findall(path.read_text(encoding="utf-8")))
    assert used <= known_variables()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_an_image_installs_extras_that_there_are(path: Path) -> None:
    extras = re.findall(r'pip install [^&]*"\.\[([a-z,]+)\]"', " ".join(arguments(path, "RUN")))
    assert extras, "no extras installed"
    assert set(extras[0].split(",")) <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_an_image_copies_files_that_there_are_and_that_the_context_lets_in(path: Path) -> None:
    let_in = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for copied in arguments(path, "COPY"):
        *sources, _ = copied.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert source in let_in


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_an_image_does_not_run_as_root(path: Path) -> None:
    assert arguments(path, "USER") == ["spider"]


@pytest.mark.parametrize("queue", QUEUES)
def test_a_worker_image_serves_its_queue(queue: str) -> None:
    (command,) = arguments(DEPLOY / f"Dockerfile.{queue}", "CMD")
    words = json.loads(command)
    assert words[:4] == ["celery", "-A", "spider_worker", "worker"]
    assert words[words.index("-Q") + 1] == queue
    assert words[words.index("--pool") + 1] == "threads"


def test_the_api_image_runs_a_script_that_is_installed() -> None:
    (command,) = arguments(DEPLOY / "Dockerfile.api", "CMD")
    assert json.loads(command)[0] in PROJECT["scripts"]


def test_services_are_redis_the_api_and_a_worker_a_queue(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"redis", "api", *QUEUES}
    for name, service in compose["services"].items():
        assert "healthcheck" in service, name
        if name != "redis":
            build = service["build"]
            assert build["dockerfile"] == f"deploy/Dockerfile.{name}"
            assert (ROOT / build["dockerfile"]).is_file()
            assert "artifacts:/var/lib/spider/artifacts" in service["volumes"]
            assert service["depends_on"]["redis"]["condition"] == "service_healthy"


def test_services_of_one_host_share_the_locks_on_its_gpus(compose: dict[str, Any]) -> None:
    services = compose["services"]
    having = [name for name, service in services.items() if "deploy" in service]
    assert having == ["offline-gen", "onpolicy-train"]
    for name in having:
        assert "devices:/var/lib/spider/worker/devices" in services[name]["volumes"]
        (made,) = re.findall(r"install -d -o spider -g spider ([^&]*)", _run_lines(name))
        assert "/var/lib/spider/worker/devices" in made.split()
    assert {"redis", "artifacts", "devices"} == set(compose["volumes"])


def _run_lines(name: str) -> str:
    return " ".join(arguments(DEPLOY / f"Dockerfile.{name}", "RUN"))


def test_redis_keeps_every_write_and_never_evicts(compose: dict[str, Any]) -> None:
    words = compose["services"]["redis"]["command"]
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--appendfsync"] == "always"
    assert options["--maxmemory-policy"] == "noeviction"


@pytest.mark.parametrize("name", ["api", *QUEUES])
def test_all_parts_share_redis_key_and_artifacts(compose: dict[str, Any], name: str) -> None:
    env = compose["services"][name]["environment"]
    assert env == compose["x-fleet"]
    assert set(env) == {"SPIDER_REDIS_URL", "SPIDER_SECRET_KEY", "SPIDER_ARTIFACTS"}
    assert env["SPIDER_ARTIFACTS"] == "/var/lib/spider/artifacts"


@pytest.mark.parametrize("queue", QUEUES)
def test_a_workers_health_is_asked_of_the_node_that_it_is(
    compose: dict[str, Any], queue: str
) -> None:
    (command,) = arguments(DEPLOY / f"Dockerfile.{queue}", "CMD")
    words = json.loads(command)
    assert words[words.index("-n") + 1] == f"{queue}@%h"
    assert f"-d {queue}@$$(hostname)" in compose["services"][queue]["healthcheck"]["test"][1]
