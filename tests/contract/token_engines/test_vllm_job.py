"""A whole training run whose student and teacher are both served by vLLM, each in its process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.contract.token_engines.conftest import ARGUMENTS, VLLM_MARKS, one_thread
from tests.support.distil import Run, make_models

pytestmark = [*VLLM_MARKS, pytest.mark.filterwarnings("ignore::UserWarning:peft")]


def test_a_job_of_provider_vllm_trains_a_student_under_a_teacher(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models")
    run = Run(
        tmp_path / "run",
        models,
        rows=10,
        model={"provider": "vllm", "name": str(models.student), "parameters": {"vllm": ARGUMENTS}},
        options={"teacher": {"name": str(models.teacher), "parameters": ARGUMENTS}},
    )
    with one_thread():
        run.go()
    steps = [record for record in run.metrics() if record["step"] > 0]
    assert len(steps) == 2
    for record in steps:
        assert record["tokens"] > 0
        assert math.isfinite(record["kl"])
    said = [message for _, code, message, _ in run.ctx.events if code == "teacher.ready"]
    assert "signal: topk" in said[0]
    assert run.artifact("adapter/adapter_model.safetensors").is_file()
