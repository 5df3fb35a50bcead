"""A whole training run whose student is at a Tinker-compatible server, broken off and taken up."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from spider_sdk.errors import EngineUnavailable, PipelineError
from tests.support.distil import Models, Run
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
