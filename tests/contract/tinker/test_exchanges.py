"""The wire: what is sent to the hosted service, and what is made of its answers.

With whichever version of the SDK is installed; ``test_sdk_versions.py`` runs these with others.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spider_sdk.errors import FatalJobError, NotSupported, RowError
from spider_worker.engines.tokens.tinker import TinkerTokenEngine
from spider_worker.tokens import SampleParams
from spider_worker.trainers.base import AdamParams, DenseTargets, Loss
from spider_worker.trainers.tinker import TinkerTrainer
from tests.contract.tinker.conftest import Run
from tests.support.tinker_exchanges import TinkerExchanges, load_exchanges
from tests.support.training import datum

pytestmark = pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")

KEY = "tml-a-key"
DATA = [
    datum((5, 9, 30), (8, 17), (-1.0, -2.0), (1.0, -0.5)),
    datum((300, 2), (44,), (-3.0,), 2.0),
]


def adapter() -> dict[str, bytes]:
    """An adapter's files, as the service makes them."""
    import torch
    from safetensors.torch import save

    shapes = {
        "base_model.model.model.layers.0.self_attn.q_proj": (4, 8),
        "base_model.model.model.unembed_tokens": (4, 16),
    }
    tensors = {}
    for name, (width, height) in shapes.items():
        tensors[f"{name}.lora_A.weight"] = torch.full((32, width), 0.5)
        tensors[f"{name}.lora_B.weight"] = torch.full((height, 32), 0.25)
    config = {"r": 32, "lora_alpha": 32, "peft_type": "LORA"}
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(tensors),
    }


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in {**files, "../elsewhere": b"not to be written"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def training() -> Iterator[TinkerExchanges]:
    import tinker

    # Later versions export RestClient, which has no archives.
    way = "files" if hasattr(tinker, "RestClient") else "archive"
    files = {
        "/files/archive.tar": packed(adapter()),
        **{f"/files/{name}": content for name, content in adapter().items()},
    }
    exchanges = [*load_exchanges("training"), *load_exchanges(way)]
    with TinkerExchanges(exchanges, files=files, key=KEY) as server:
        yield server


@pytest.fixture
def scoring() -> Iterator[TinkerExchanges]:
    with TinkerExchanges(load_exchanges("scoring"), key=KEY) as server:
        yield server


async def passes(trainer: TinkerTrainer) -> None:
    ppo = await trainer.forward_backward(DATA, Loss("ppo"))
    assert ppo.loss == pytest.approx(-2.5)
    assert ppo.metrics["tinker/loss:sum"] == -2.5
    np.testing.assert_array_equal(ppo.logprobs[0][DATA[0].mask], [-1.0, -2.0])
    np.testing.assert_array_equal(ppo.logprobs[1][DATA[1].mask], [-3.0])
    cispo = await trainer.forward_backward(DATA, Loss("cispo", 0.5, 3.0))
    # The ratio of the second token is e, between the bounds.
    assert cispo.loss == pytest.approx(-(1.0 * -1.0 + np.e * -0.5 * -1.0 + 2.0 * -3.0))
    targets = DenseTargets(
        positions=np.array([3]),
        ids=np.array([[8, 9, -1]])[:, :2],
        probs=np.array([[0.75, 0.25]], np.float32),
        weights=np.array([2.0], np.float32),
        objective="cross_entropy",
    )
    dense = datum((5, 9, 30), (8,), advantages=0.0, targets=targets)
    output = await trainer.forward_backward([dense], Loss())
    assert output.loss == pytest.approx(2.0 * (0.75 * 2.0 + 0.25 * 1.0))
    assert output.logprobs[0][3] == -2.0


async def checkpoints(trainer: TinkerTrainer, folder: Path) -> None:
    states = [await trainer.save_state(folder) for _ in range(3)]
    assert states[-1]["path"] == "tinker://r-1:train:0/weights/three"
    await trainer.load_state(states[-1], folder)
    await trainer.load_weights("tinker://r-0:train:0/weights/last")
    for path, said in (("r-9", "Llama"), ("r-8", "rank 8"), ("r-7", "no training weights")):
        with pytest.raises(FatalJobError, match=said):
            await trainer.load_weights(f"tinker://{path}:train:0/weights/last")
    with pytest.raises(NotSupported, match="provider local"):
        await trainer.load_weights("someone/an-adapter")
    await trainer.save_adapter(folder)


def test_a_training_run(training: TinkerExchanges, run: Run[Any], tmp_path: Path) -> None:
    async def scenario() -> None:
        trainer = TinkerTrainer(
            "Qwen/Qwen3-8B", lora_rank=32, seed=1, base_url=training.url, api_key=KEY
        )
        await trainer.start()
        try:
            assert trainer.info.dense == {"cross_entropy"}
            assert trainer.info.tokenizer == "Qwen/Qwen3-8B"
            await passes(trainer)
            measured = await trainer.optim_step(AdamParams(1e-4, grad_clip_norm=1.0))
            assert measured["tinker/unclipped_grad_l2:mean"] == 0.25
            sampler = await trainer.sampler()
            stopped, cut = await sampler.sample((5, 9), 2, SampleParams(3, stop=(2,)))
            assert (stopped.tokens, stopped.stop_reason) == ((7, 2), "stop")
            assert (cut.tokens, cut.stop_reason) == ((7, 8, 9), "length")
            np.testing.assert_array_equal(cut.logprobs, [-0.5, -1.0, -2.0])
            await checkpoints(trainer, tmp_path)
        finally:
            await trainer.close()

    run(scenario())
    assert training.problems == []
    assert training.left == []
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Qwen/Qwen3-8B"
    assert config["target_modules"] == ["lm_head", "q_proj"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_teacher(scoring: TinkerExchanges, run: Run[Any]) -> None:
    async def scenario() -> None:
        engine = TinkerTokenEngine("Qwen/Qwen3-32B", base_url=scoring.url, api_key=KEY)
        await engine.start()
        try:
            assert engine.info.topk == 20
            plain = await engine.compute_logprobs((5, 9, 30))
            np.testing.assert_array_equal(plain.logprobs, [np.nan, -1.25, -2.5])
            assert plain.topk is None
            best = (await engine.compute_logprobs((5, 9, 30), topk=2)).topk
            assert best is not None
            np.testing.assert_array_equal(best.ids, [[-1, -1], [8, 9], [4, 7]])
            np.testing.assert_array_equal(
                best.logprobs, np.float32([[-np.inf, -np.inf], [-0.5, -1.25], [-0.25, -3.0]])
            )
            samples = await engine.sample((5, 9), 2, SampleParams(2, seed=3))
            assert {sample.tokens for sample in samples} == {(6, 7), (8, 9)}
            with pytest.raises(RowError, match="context"):
                await engine.sample((5, 9, 30, 41), 1, SampleParams(3))
        finally:
            await engine.close()

    run(scenario())
    assert scoring.problems == []
    assert scoring.left == []
