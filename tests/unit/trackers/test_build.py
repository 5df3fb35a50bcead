"""Which tracker a job gets, with which keys, and what is refused before the first step."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.errors import (
    AuthError,
    EngineUnavailable,
    FatalJobError,
    NotSupported,
    PipelineError,
)
from spider_worker.trackers.base import RunSpec
from spider_worker.trackers.build import build_tracker
from spider_worker.trackers.trackio import TrackioBackend
from spider_worker.trackers.wandb import WandbBackend
from tests.support.trackers import Tracked, on_policy_job

KEY = {"WANDB_API_KEY": "k" * 40}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_BASE_URL", "WANDB_API_KEY", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)


def tracked(folder: Path, secrets: dict[str, str] | None = None, **options: Any) -> Tracked:
    options = {"wandb_project": "sums", **options}
    return Tracked(folder, on_policy_job(**options), secrets or {})


def test_a_job_without_a_project_has_no_tracker(tmp_path: Path) -> None:
    assert build_tracker(tracked(tmp_path, KEY, wandb_project=None), None) is None
    assert build_tracker(tracked(tmp_path, {**KEY, "WANDB_MODE": "disabled"}), None) is None


def test_a_run_keeps_its_id_and_lies_in_the_scratch_folder(tmp_path: Path) -> None:
    first = build_tracker(tracked(tmp_path / "1", KEY, wandb_name="try 3"), None)
    second = build_tracker(tracked(tmp_path / "2", KEY, wandb_name="try 3"), 40)
    assert first is not None
    assert second is not None
    assert first.spec.run_id == second.spec.run_id == "spider-0123456789abcdef"
    assert (first.spec.project, first.spec.name) == ("sums", "try 3")
    assert (first.spec.resume, second.spec.resume) == (None, 40)
    assert first.spec.folder == str(tmp_path / "1" / "tracker")
    assert first.env["HOME"] == first.spec.folder


def test_the_recipe_goes_along_and_no_key(tmp_path: Path) -> None:
    tracker = build_tracker(tracked(tmp_path, KEY, lora_rank=8, api_key_env="SOME_KEY"), None)
    assert tracker is not None
    config = tracker.spec.config
    assert config["lora_rank"] == 8
    assert (config["student"], config["teacher"]) == ("org/student", "org/teacher")
    assert not [name for name in config if "key" in name]
    assert KEY["WANDB_API_KEY"] not in str(tracker.spec)


def test_a_tracker_gets_its_own_key_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {**KEY, "OPENAI_API_KEY": "sk-other", "HF_TOKEN": "hf_other"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)  # as a runner has them
    tracker = build_tracker(tracked(tmp_path, secrets), None)
    assert tracker is not None
    assert tracker.env["WANDB_API_KEY"] == KEY["WANDB_API_KEY"]
    assert not {"sk-other", "hf_other"} & set(tracker.env.values())


def test_a_missing_key_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "o" * 40)  # the operator's, which is not the job's
    with pytest.raises(AuthError, match=r"no WANDB_API_KEY.*WANDB_MODE=offline"):
        build_tracker(tracked(tmp_path), None)


@pytest.mark.parametrize("mode", ["offline", "dryrun"])
def test_offline_needs_no_key_whoever_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    for_the_job = build_tracker(tracked(tmp_path, {"WANDB_MODE": mode}), None)
    monkeypatch.setenv("WANDB_MODE", mode)
    for_the_worker = build_tracker(tracked(tmp_path), None)
    for tracker in (for_the_job, for_the_worker):
        assert tracker is not None
        assert tracker.spec.offline


def test_a_mode_that_is_not_supported(tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match="WANDB_MODE=shared"):
        build_tracker(tracked(tmp_path, {"WANDB_MODE": "shared"}), None)


def test_a_teams_project(tmp_path: Path) -> None:
    tracker = build_tracker(tracked(tmp_path, KEY, wandb_project="team/sums"), None)
    assert tracker is not None
    assert (tracker.spec.entity, tracker.spec.project) == ("team", "sums")
    secrets = {**KEY, "WANDB_ENTITY": "crew"}
    tracker = build_tracker(tracked(tmp_path, secrets), None)
    assert tracker is not None
    assert tracker.spec.entity == "crew"


@pytest.mark.parametrize("name", ["a/b/c", "what?", "50%", "team/"])
def test_a_name_that_is_none_of_a_project(tmp_path: Path, name: str) -> None:
    with pytest.raises(FatalJobError, match="no name of a project"):
        build_tracker(tracked(tmp_path, KEY, wandb_project=name), None)


@pytest.mark.parametrize(
    ("tracker", "variable"), [("wandb", "WANDB_BASE_URL"), ("trackio", "TRACKIO_SERVER_URL")]
)
def test_a_job_leads_to_no_private_address(tmp_path: Path, tracker: str, variable: str) -> None:
    secrets = {**KEY, "TRACKIO_WRITE_TOKEN": "t"}

    def build(url: str, *, allow_private: bool) -> Any:
        ctx = tracked(tmp_path, {**secrets, variable: url}, tracker=tracker)
        return build_tracker(ctx, None, allow_private=allow_private)

    for url in ("http://127.0.0.1:8080", "http://localhost/", "http://[::1]:1"):
        with pytest.raises(FatalJobError, match=f"{variable} leads to .*private"):
            build(url, allow_private=False)
        assert build(url, allow_private=True).spec.url.rstrip("/") == url.rstrip("/")
    with pytest.raises(FatalJobError, match="metadata"):
        build("http://169.254.169.254/", allow_private=True)
    with pytest.raises(FatalJobError, match=f"{variable} is no address"):
        build("file:///etc/passwd", allow_private=True)
    with pytest.raises(PipelineError, match="cannot be found"):
        build("http://no-such-host.invalid/", allow_private=True)


def test_the_workers_own_server_may_be_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://10.0.0.7:8080")
    tracker = build_tracker(tracked(tmp_path, KEY), None)
    assert tracker is not None
    assert tracker.env["WANDB_BASE_URL"] == tracker.spec.url == "http://10.0.0.7:8080"


def test_trackio_knows_runs_by_name_so_each_job_has_its_own(tmp_path: Path) -> None:
    tracker = build_tracker(tracked(tmp_path, tracker="trackio", wandb_name="try 3"), None)
    assert tracker is not None
    assert tracker.spec.name == "try 3-0123456789abcdef"
    assert tracker.spec.offline
    assert tracker.env["TRACKIO_DIR"].startswith(str(tmp_path))


def test_the_token_of_a_trackio_server_stays_out_of_what_is_said(tmp_path: Path) -> None:
    url = "https://8.8.8.8/?write_token=hidden"
    ctx = tracked(tmp_path, {"TRACKIO_SERVER_URL": url}, tracker="trackio")
    tracker = build_tracker(ctx, None)
    assert tracker is not None
    assert tracker.env["TRACKIO_WRITE_TOKEN"] == "hidden"
    assert "hidden" not in str(tracker.spec)


@pytest.mark.parametrize(
    ("secrets", "said"),
    [
        ({"TRACKIO_SERVER_URL": "https://8.8.8.8/"}, "no TRACKIO_WRITE_TOKEN"),
        ({"TRACKIO_SPACE_ID": "me/board"}, "no HF_TOKEN"),
    ],
)
def test_trackio_without_its_token(tmp_path: Path, secrets: dict[str, str], said: str) -> None:
    with pytest.raises(AuthError, match=said):
        build_tracker(tracked(tmp_path, secrets, tracker="trackio"), None)


@pytest.mark.parametrize("backend", [WandbBackend, TrackioBackend])
def test_a_missing_package_is_named_with_its_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: type[WandbBackend]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    spec = RunSpec("wandb", "p", "r", "n", str(tmp_path))
    with pytest.raises(EngineUnavailable, match=r"spider-distill\[(wandb|trackio)\]"):
        backend(spec)
