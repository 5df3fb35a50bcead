"""Whole training runs whose student is at a Tinker-compatible server: one that is broken off and
taken up, and one whose teacher is there, too, and whose adapter goes to the Hub."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from spider_sdk.errors import EngineUnavailable, PipelineError
from tests.support.distil import Models, Run
from tests.support.hub_emulator import USER, WRITE_TOKEN, HubEmulator
from tests.support.tinker_server import TinkerServer
from tests.support.tiny_model import make_tiny_model
from tests.unit.onpolicy.test_run import after

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def test_a_job_of_provider_tinker_trains_a_student_and_goes_on_where_it_was_broken_off(
    tinker_server: TinkerServer, tmp_path: Path
) -> None:
    models = Models(
        Path("/"),
        tinker_server.model,
        make_tiny_model(tmp_path / "teacher", vocabulary=512, hidden=32, context=256, seed=1),
    )
    run = Run(
        tmp_path / "run",
        models,
        rows=14,
        model={"provider": "tinker", "base_url": tinker_server.url},
        options={
            "teacher": {"provider": "local", "name": str(models.teacher)},
            "compute_post_kl": True,
            "eval_every": 2,
        },
    )
    run._settings = dataclasses.replace(run._settings, allow_private_urls=True)
    gone = EngineUnavailable("the service is gone")
    run._changes["trainer"] = after(2, gone, "forward_backward")
    with pytest.raises(PipelineError, match="is gone"):
        run.go()
    run._changes.clear()
    run.go()
    assert run.events("train.resumed") == [{"step": 2}]
    records = run.metrics()
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert [step for step, record in enumerate(records) if "eval/kl" in record] == [0, 2, 3]
    for record in records[1:]:
        assert math.isfinite(record["loss"])
        assert math.isfinite(record["post_kl"])
        assert record["tokens"] > 0
    config = json.loads(run.artifact("adapter/adapter_config.json").read_bytes())
    assert (config["r"], config["base_model_name_or_path"]) == (4, tinker_server.name)
    assert run.artifact("checkpoints/step-000002/adapter_model.safetensors").is_file()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubEmulator]:
    """What jobs of this process take for the Hub."""
    with HubEmulator() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield hub
        huggingface_hub.close_session()


def test_a_teacher_by_its_bare_name_is_at_the_students_service_and_the_adapter_on_the_hub(
    tinker_server: TinkerServer, hub: HubEmulator, tmp_path: Path
) -> None:
    repo = f"{USER}/distilled"
    run = Run(
        tmp_path / "run",
        Models(Path("/"), tinker_server.model, tinker_server.model),
        rows=10,
        model={"provider": "tinker", "base_url": tinker_server.url},
        options={"teacher": tinker_server.name, "save_every": 1},
        output={"mode": "upload_hf", "hf": {"repo_id": repo, "repo_type": "model"}},
    )
    run._settings = dataclasses.replace(run._settings, allow_private_urls=True)
    result = run.go(secrets={"HF_TOKEN": WRITE_TOKEN}).result
    records = run.metrics()
    assert [record["step"] for record in records] == [0, 1, 2]
    # It is the student's own base: until that has learnt something, the two agree.
    for name in ("eval/kl", f"eval/kl/{tinker_server.name}"):
        assert records[0][name] == pytest.approx(0, abs=1e-3)
    assert records[1]["kl"] == pytest.approx(0, abs=1e-3)
    assert all(record["coverage"] == 1 for record in records[1:])
    state = json.loads((tmp_path / "run" / "state.json").read_bytes())["state"]
    assert state["progress"]["signals"] == {tinker_server.name: "sampled"}
    assert result.remote_artifact == f"{hub.endpoint}/{repo}"
    there = {path: blob.content for path, blob in hub.repo(repo, "model").files.items()}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert there[name] == run.artifact(f"adapter/{name}").read_bytes()
        assert there[f"checkpoints/step-000002/{name}"] == there[name]
        assert f"checkpoints/step-000001/{name}" in there
    assert there["metrics.jsonl"] == run.artifact("metrics.jsonl").read_bytes()
    card = there["README.md"].decode()
    assert f"`{tinker_server.model.name}`, signal sampled |" in card
    assert "| Steps | 2 |" in card
