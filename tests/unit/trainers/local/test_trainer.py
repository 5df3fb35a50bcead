"""What is the local trainer's own: parameters, checkpoints, its samplers, an adapter server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spider_sdk.errors import EngineUnavailable, FatalJobError, NotSupported, PipelineError
from spider_worker.tokens import SampleParams, TokenEngine
from spider_worker.trainers.base import AdamParams, Loss
from spider_worker.trainers.local import LocalTrainer, check_parameters
from tests.support.tiny_model import make_tiny_model
from tests.support.training import PROMPTS, datum, roll_out

Start = Callable[..., LocalTrainer]
DATA = [
    datum(PROMPTS[0], (8, 17, 44, 44), (-3.0, -4.0, -5.0, -6.0), (1.0, -0.5, 0.25, 2.0)),
    datum(PROMPTS[2], (1, 2, 3), (-6.0,) * 3, (1.0, -1.0, 1.0)),
]


def take_a_step(runner: asyncio.Runner, trainer: LocalTrainer, rate: float = 1e-2) -> None:
    runner.run(trainer.forward_backward(DATA, Loss()))
    runner.run(trainer.optim_step(AdamParams(rate)))


def same(one: Any, other: Any) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"lora_alfa": 1}, "did you mean 'lora_alpha'"),
        ({"lora_alpha": 0}, "lora_alpha: expected"),
        ({"target_modules": []}, "target_modules: expected"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens: expected"),
        ({"gradient_checkpointing": "yes"}, "gradient_checkpointing: expected"),
        ({"device": "gpu"}, "device: expected"),
        ({"dtype": "int8"}, "dtype: expected"),
        ({"max_batch": True}, "max_batch: expected"),
    ],
)
def test_parameters_are_refused_by_name(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(NotSupported, match=message):
        check_parameters(parameters)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(start: Start) -> None:
    with pytest.raises(EngineUnavailable, match="no such GPU"):
        start(device="cuda")


def test_a_model_that_is_not_there_is_refused(start: Start, tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="could not be loaded"):
        start(model=tmp_path)


def test_modules_that_are_not_there_are_refused(start: Start) -> None:
    with pytest.raises(NotSupported, match="q_projection"):
        start(target_modules=["q_projection"])


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")
def test_target_modules_are_those_asked_for(
    start: Start, runner: asyncio.Runner, tmp_path: Path
) -> None:
    runner.run(start(target_modules=["q_proj", "lm_head"]).save_adapter(tmp_path))
    names = {name.split(".")[-3] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {"q_proj", "lm_head"}


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")
def test_an_adapter_on_tied_weights_is_merged_apart(start: Start, runner: asyncio.Runner) -> None:
    """The head's weight is the embedding's too, which has no adapter."""
    trainer = start(target_modules=["lm_head", "o_proj"])
    take_a_step(runner, trainer, 0.1)
    want = runner.run(trainer.forward(DATA))
    engine = runner.run(trainer.sampler())
    for d, logprobs in zip(DATA, want, strict=True):
        scores = runner.run(engine.compute_logprobs(d.tokens.tolist()))
        np.testing.assert_allclose(scores.logprobs[d.mask], logprobs[d.mask], atol=1e-4)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")
def test_an_adapter_on_the_head_alone_learns(start: Start, runner: asyncio.Runner) -> None:
    trainer = start(target_modules=["lm_head"])
    before = runner.run(trainer.forward(DATA))
    take_a_step(runner, trainer)
    assert not same(before, runner.run(trainer.forward(DATA)))


def test_the_seed_makes_the_adapter(start: Start, runner: asyncio.Runner, tmp_path: Path) -> None:
    files = []
    for number, seed in enumerate((7, 7, 8)):
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.rand(number)  # of no influence, and not influenced
        state = torch.get_rng_state()
        runner.run(start(seed=seed).save_adapter(folder))
        assert torch.equal(state, torch.get_rng_state())
        files.append(load_file(folder / "adapter_model.safetensors"))
    key = next(name for name in files[0] if "lora_A" in name)
    assert torch.equal(files[0][key], files[1][key])
    assert not torch.equal(files[0][key], files[2][key])


def test_sampled_logprobs_are_the_policys_in_float32(start: Start, runner: asyncio.Runner) -> None:
    trainer = start()
    take_a_step(runner, trainer)
    samples = runner.run(roll_out(runner.run(trainer.sampler()), n=4, max_tokens=20))
    data = [datum(prompt, s.tokens, s.logprobs) for prompt, s in samples]
    for d, logprobs in zip(data, runner.run(trainer.forward(data)), strict=True):
        np.testing.assert_allclose(d.logprobs[d.mask], logprobs[d.mask], atol=3e-5)


def test_sampling_leaves_the_weights_as_they_were(start: Start, runner: asyncio.Runner) -> None:
    trainer = start()
    take_a_step(runner, trainer)
    before = runner.run(trainer.forward(DATA))
    runner.run(roll_out(runner.run(trainer.sampler())))
    assert same(before, runner.run(trainer.forward(DATA)))


def test_a_stale_sampler_raises(start: Start, runner: asyncio.Runner) -> None:
    trainer = start()
    first = runner.run(trainer.sampler())
    assert runner.run(trainer.sampler()) is first
    take_a_step(runner, trainer)
    with pytest.raises(PipelineError, match="stale"):
        runner.run(first.sample(PROMPTS[0], 1, SampleParams(2)))
    second = runner.run(trainer.sampler())
    runner.run(second.sample(PROMPTS[0], 1, SampleParams(2)))
    runner.run(trainer.close())
    with pytest.raises(PipelineError, match=r"stale|closed"):
        runner.run(second.sample(PROMPTS[0], 1, SampleParams(2)))


def test_a_trainer_is_started_before_it_is_used(tiny_model: Path, runner: asyncio.Runner) -> None:
    trainer = LocalTrainer(str(tiny_model), lora_rank=2)
    with pytest.raises(PipelineError, match="before start"):
        runner.run(trainer.forward(DATA))
    runner.run(trainer.close())


def test_the_loop_stays_free_while_it_trains(start: Start, runner: asyncio.Runner) -> None:
    trainer = start()

    async def both() -> int:
        work = asyncio.ensure_future(trainer.forward_backward(DATA * 8, Loss()))
        turns = 0
        while not work.done():
            turns += 1
            await asyncio.sleep(0)
        return turns

    assert runner.run(both()) > 2


def begun_with(
    folder: Path, trainer: LocalTrainer, start: Start, runner: asyncio.Runner
) -> LocalTrainer:
    """Another trainer that begins with the adapter in ``folder``, and is seen to say what
    ``trainer`` does, whose it is."""
    want = runner.run(trainer.forward(DATA))
    other = start(seed=9, checkpoint=str(folder))
    assert same(want, runner.run(other.forward(DATA)))
    return other


def test_weights_are_loaded_with_fresh_moments(
    start: Start, runner: asyncio.Runner, tmp_path: Path
) -> None:
    trainer = start()
    take_a_step(runner, trainer)
    runner.run(trainer.save_adapter(tmp_path))
    other = begun_with(tmp_path, trainer, start, runner)
    state_folder = tmp_path / "state"
    state_folder.mkdir()
    assert runner.run(other.save_state(state_folder))["step"] == 0
    assert not any("exp_avg" in key for key in load_file(state_folder / "optimizer.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": "org/other"}, "'org/other', and this job trains"),
        ({"r": 8}, "LoRA rank 8, and this job asks for 4"),
        ({"lora_alpha": 16}, "lora_alpha 16"),
        ({"use_dora": True}, "no plain LoRA"),
    ],
)
def test_checkpoints_of_something_else_are_refused(
    start: Start, runner: asyncio.Runner, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    trainer = start()
    runner.run(trainer.save_adapter(tmp_path))
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    before = runner.run(trainer.forward(DATA))
    with pytest.raises(FatalJobError, match=message):
        runner.run(trainer.load_weights(str(tmp_path)))
    assert same(before, runner.run(trainer.forward(DATA)))


def test_a_checkpoint_that_is_none_is_refused(
    start: Start, runner: asyncio.Runner, tmp_path: Path
) -> None:
    with pytest.raises(FatalJobError, match="no PEFT adapter"):
        runner.run(start().load_weights(str(tmp_path)))


def test_a_checkpoint_that_is_broken_is_refused(
    start: Start, runner: asyncio.Runner, tmp_path: Path
) -> None:
    runner.run(start().save_adapter(tmp_path))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(FatalJobError, match="no PEFT adapter that can be read"):
        runner.run(start().load_weights(str(tmp_path)))


def test_a_checkpoint_of_other_modules_is_refused(
    start: Start, runner: asyncio.Runner, tmp_path: Path
) -> None:
    runner.run(start(target_modules=["q_proj"]).save_adapter(tmp_path))
    with pytest.raises(FatalJobError, match="adapts other modules"):
        start(checkpoint=str(tmp_path))


def test_a_checkpoint_of_other_shapes_is_refused(
    start: Start, runner: asyncio.Runner, tmp_path: Path
) -> None:
    """A model of the same name and another size."""
    adapter, wide = tmp_path / "adapter", tmp_path / "wide"
    adapter.mkdir()
    runner.run(start().save_adapter(adapter))
    make_tiny_model(wide, hidden=96)
    config = adapter / "adapter_config.json"
    text = json.loads(config.read_text())
    config.write_text(json.dumps(text | {"base_model_name_or_path": "org/wide"}))
    with pytest.raises(FatalJobError, match="another base model"):
        start(model=wide, checkpoint=str(adapter))


def test_a_state_of_another_base_model_is_refused(
    start: Start, runner: asyncio.Runner, tmp_path: Path
) -> None:
    trainer = start()
    state = runner.run(trainer.save_state(tmp_path))
    with pytest.raises(FatalJobError, match=r"base model 'org/other'.*tiny-model"):
        runner.run(trainer.load_state({**state, "base_model": "org/other"}, tmp_path))
    for name in ("optimizer.safetensors", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"torn")
        with pytest.raises(FatalJobError, match="cannot be read"):
            runner.run(trainer.load_state(state, tmp_path))
        runner.run(trainer.save_state(tmp_path))


def test_a_state_keeps_the_moments(start: Start, runner: asyncio.Runner, tmp_path: Path) -> None:
    """Adam without its moments would take another step."""
    trainer = start()
    take_a_step(runner, trainer)
    state = json.loads(json.dumps(runner.run(trainer.save_state(tmp_path))))
    assert state["step"] == 1
    take_a_step(runner, trainer)
    want = runner.run(trainer.forward(DATA))
    other = start(seed=1)
    runner.run(other.load_state(state, tmp_path))
    take_a_step(runner, other)
    assert same(want, runner.run(other.forward(DATA)))


def test_a_state_is_an_adapter(start: Start, runner: asyncio.Runner, tmp_path: Path) -> None:
    """All that a run leaves whose every attempt was killed."""
    trainer = start()
    take_a_step(runner, trainer)
    runner.run(trainer.save_state(tmp_path))
    begun_with(tmp_path, trainer, start, runner)
    name = json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(name)
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base, tmp_path))
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert loaded.keys() == written.keys()
    assert all((loaded[name] == values).all() for name, values in written.items())


class Server:
    """An AdapterServer that notes what it is given."""

    def __init__(self, engine: TokenEngine) -> None:
        self.engine = engine
        self.served: list[dict[str, torch.Tensor]] = []
        self.folders: list[Path] = []
        self.calls: list[str] = []

    async def start(self) -> None:
        self.calls.append("start")

    async def serve(self, adapter: Path) -> TokenEngine:
        assert (adapter / "adapter_config.json").is_file()
        self.served.append(load_file(adapter / "adapter_model.safetensors"))
        self.folders.append(adapter)
        return self.engine

    async def close(self) -> None:
        self.calls.append("close")


def test_an_adapter_server_gets_each_version_once(start: Start, runner: asyncio.Runner) -> None:
    engine: Any = object()
    server = Server(engine)
    trainer = start(server=server)
    for _ in range(2):
        assert runner.run(trainer.sampler()) is engine
        assert runner.run(trainer.sampler()) is engine
        take_a_step(runner, trainer)
    assert len(server.served) == 2
    assert not any(folder.exists() for folder in server.folders)
    changed = [key for key, value in server.served[0].items() if "lora_B" in key]
    assert all((server.served[0][key] == 0).all() for key in changed)
    assert any((server.served[1][key] != 0).any() for key in changed)
    runner.run(trainer.close())
    assert server.calls == ["start", "close"]


def test_bfloat16_trains_and_samples(start: Start, runner: asyncio.Runner) -> None:
    """Without merging: float32 adapters on bfloat16 weights."""
    trainer = start(dtype="bfloat16")
    take_a_step(runner, trainer)
    samples = runner.run(roll_out(runner.run(trainer.sampler()), n=2, max_tokens=8))
    data = [datum(prompt, s.tokens, s.logprobs) for prompt, s in samples]
    for d, logprobs in zip(data, runner.run(trainer.forward(data)), strict=True):
        assert np.abs(d.logprobs[d.mask] - logprobs[d.mask]).mean() < 0.5
