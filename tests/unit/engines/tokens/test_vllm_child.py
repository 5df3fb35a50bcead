"""What vLLM's process finds out before it starts the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spider_worker.engines.tokens.vllm_child import stored_dtype
from tests.support.tiny_model import make_tiny_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_the_dtype_is_that_of_the_stored_weights(tmp_path: Path, dtype: str | None) -> None:
    model = make_tiny_model(tmp_path / "model", vocabulary=384, hidden=32, context=128)
    config = json.loads((model / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (model / "config.json").write_text(json.dumps(config))
    assert stored_dtype(str(model), {"max_model_len": 64}) == (dtype or "auto")
