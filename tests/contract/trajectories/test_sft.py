"""A data set of trajectories trains with TRL's SFTTrainer, in both formats."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from spider_worker.trajectories.messages import FORMATS
from spider_worker.trajectories.record import Record
from spider_worker.trajectories.rows import row, schema
from spider_worker.trajectories.shards import write_shards
from tests.support.trajectories import conversation, record

ROOT = Path(__file__).parents[3]
TRL = ROOT / ".venv-trl" / "bin" / "python"

pytestmark = pytest.mark.skipif(not TRL.exists(), reason="TRL is not there: make trl adds it")


@pytest.fixture(scope="module")
def steps(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each format what one training step on two rows came to."""
    work = tmp_path_factory.mktemp("sft")
    records = [record("a"), record("b", messages=conversation("{broken"), tools=[])]
    data = {}
    for name in FORMATS:
        (work / name).mkdir()
        rows = [row(Record(one), name, cost=None) for one in records]
        files, _ = write_shards(rows, schema(name), work / name)
        data[name] = str(files[0])
    spec = {"model": str(tiny_model), "work": str(work), "data": data}
    (work / "spec.json").write_text(json.dumps(spec))
    env = {
        **os.environ,
        "HF_HOME": str(work / "home"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    script = ROOT / "tests" / "support" / "sft_step.py"
    done = subprocess.run(
        [TRL, "-P", script, work / "spec.json", work / "out.json"],
        capture_output=True,
        text=True,
        env=env,
        cwd=work,
    )
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads((work / "out.json").read_text())
    return made


@pytest.mark.parametrize("messages_format", FORMATS)
def test_a_step_has_a_finite_loss_on_the_agents_turns_alone(
    steps: dict[str, Any], messages_format: str
) -> None:
    made = steps[messages_format]
    assert made["rows"] == 2
    assert math.isfinite(made["loss"])
    assert made["loss"] > 0
    learnt = made["learnt"]
    for said in ("First the files.", "I look around.", '{"name": "finish"', "</tool_call>"):
        assert said in learnt
    for seen in ("You mend code.", "The sum is wrong.", "<tool_response>", "sum.py"):
        assert seen not in learnt
        assert seen in made["rendered"]


def test_text_is_what_a_template_of_this_dialect_makes_of_tool_calls(steps: dict[str, Any]) -> None:
    assert steps["text"]["rendered"] == steps["openai"]["rendered"]
    assert steps["text"]["learnt"] == steps["openai"]["learnt"]
    assert '"description": "Run a command."' in steps["text"]["rendered"]
