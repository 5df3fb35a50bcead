from __future__ import annotations

import os
from pathlib import Path

import pytest

from spider_api.embedded.isolation import choose_sandbox
from spider_api.embedded.options import FleetOptions, child_environment, demo_folder
from spider_api.embedded.state import StateFolder
from spider_sdk.settings import load
from spider_worker.settings import FleetSettings, WorkerSettings


def environment(state: StateFolder, **inherited: str) -> dict[str, str]:
    options = FleetOptions(state=state.path, data_roots=(state.path,), sandbox="bwrap")
    return child_environment(options, state, "redis://:pw@127.0.0.1:1/0", inherited)


def test_every_path_of_a_child_lies_in_the_state_folder(state: StateFolder) -> None:
    env = environment(state)
    fleet, worker = load(FleetSettings, env), load(WorkerSettings, env)
    assert fleet.redis_url == "redis://:pw@127.0.0.1:1/0"
    for path in (fleet.artifacts, fleet.secret_key_file, worker.state, worker.env_cache):
        assert path.is_relative_to(state.path)
    assert worker.allow_private_urls
    assert worker.sandbox == "bwrap"


def test_jobs_may_name_what_the_operator_and_the_demo_name(state: StateFolder) -> None:
    roots = load(WorkerSettings, environment(state, SPIDER_DATA_ROOTS="/mnt/models")).data_roots
    assert roots is not None
    assert roots.split(os.pathsep) == ["/mnt/models", str(state.path), str(demo_folder())]


def test_a_persons_own_settings_do_not_turn_the_fleet_elsewhere(state: StateFolder) -> None:
    env = environment(
        state,
        SPIDER_SECRET_KEY="x",
        SPIDER_CONFIG="/elsewhere",
        SPIDER_REDIS_URL="redis://elsewhere",
        SPIDER_LEASE="5",
        HOME="/home/someone",
    )
    assert "SPIDER_SECRET_KEY" not in env
    assert "SPIDER_CONFIG" not in env
    assert env["SPIDER_REDIS_URL"] != "redis://elsewhere"
    assert env["SPIDER_LEASE"] == "5"  # a tuning that means the same here
    assert env["HOME"] == "/home/someone"


def test_the_operators_sandbox_stands() -> None:
    assert choose_sandbox({"SPIDER_SANDBOX": "namespaces"}) == ("namespaces", None)


def test_where_a_worker_can_isolate_or_not_is_what_the_worker_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refusing = tmp_path / "python"
    refusing.write_text("#!/bin/sh\necho 'bwrap: there is no bwrap on PATH' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr("spider_api.embedded.isolation.sys.executable", str(refusing))

    sandbox, warning = choose_sandbox(dict(os.environ) | {"SPIDER_SANDBOX": ""})

    assert sandbox == "process"
    assert warning is not None
    assert warning.endswith("bwrap: there is no bwrap on PATH")


def test_the_probe_asks_the_sandbox_of_this_version() -> None:
    env = {name: value for name, value in os.environ.items() if name != "SPIDER_SANDBOX"}
    sandbox, warning = choose_sandbox(env)
    assert (sandbox, warning) == ("auto", None) or "isolation" in str(warning)
