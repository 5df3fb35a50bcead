"""The backward pass against autograd on the plain model."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spider_sdk.errors import FatalJobError, NotSupported
from spider_worker.distill import losses
from spider_worker.torch_models import scoring
from spider_worker.torch_models.causal import CausalModel, load_model
from spider_worker.trainers.base import AdamParams, Datum, DenseTargets, Loss
from spider_worker.trainers.local import LocalTrainer, step
from spider_worker.trainers.local.adapter import Adapter
from tests.support.training import PROMPTS, datum

Start = Callable[..., LocalTrainer]


def dense(objective: Any, *positions: int, width: int = 3) -> DenseTargets:
    count = len(positions)
    ids = np.arange(count * width).reshape(count, width) * 7 % 400
    return DenseTargets(
        np.array(positions),
        ids,
        np.full((count, width), 0.9 / width, np.float32),
        np.linspace(0.5, 2, count, dtype=np.float32),
        objective,
    )


DATA = [
    datum(PROMPTS[0], (8, 17, 44, 44), (-3.0, -4.0, -5.0, -6.0), (1.0, -0.5, 0.25, 2.0)),
    datum(PROMPTS[1], (200, 9), (-2.0, -7.0), (0.5, 0.0), dense("cross_entropy", 8)),
    datum(PROMPTS[2], (1, 2, 3, 4, 5), (-6.0,) * 5, (0, 1, -1, 0, 0), dense("jsd", 2, 5, 6)),
    datum(PROMPTS[2], (6, 7), (-6.0, -6.0), (1.0, 0.0), dense("cross_entropy", 3, width=5)),
]


@pytest.fixture
def student(tiny_model: Path) -> tuple[CausalModel, Adapter]:
    model = load_model(str(tiny_model), {}, where="model.parameters")
    adapter = Adapter(model, rank=4, alpha=32, targets="all-linear", seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # B = 0 would leave A without a gradient
        for weight in adapter.weights.values():
            weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    adapter.changed()
    return model, adapter


def gradients(adapter: Adapter) -> dict[str, torch.Tensor]:
    found = {}
    for name, weight in adapter.weights.items():
        assert weight.grad is not None
        found[name], weight.grad = weight.grad, None
    return found


def reference(model: CausalModel, data: list[Datum], loss: Loss) -> float:
    """A sequence at a time, whole logits, terms one by one."""
    total = torch.zeros(())
    for d in data:
        tokens = torch.from_numpy(d.tokens)
        logits = model.module(input_ids=tokens[None]).logits[0]
        logprobs = logits[:-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        total = total + losses.policy_loss(
            loss.name,
            logprobs,
            torch.from_numpy(d.logprobs[1:]),
            torch.from_numpy(d.advantages[1:]),
            torch.from_numpy(d.mask[1:]),
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
        )
        if (t := d.targets) is not None:
            function = losses.jsd if t.objective == "jsd" else losses.cross_entropy
            arrays = map(torch.from_numpy, (t.ids, t.probs, t.weights))
            total = total + function(logits[torch.from_numpy(t.positions) - 1], *arrays)
    torch.autograd.backward(total)
    return total.item()


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo"])
def test_loss_and_gradient_are_those_of_the_plain_model(
    student: tuple[CausalModel, Adapter], name: str
) -> None:
    model, adapter = student
    loss = Loss(name, 0.5, 3.0)
    want = reference(model, DATA, loss)
    wanted = gradients(adapter)
    output = step.forward_backward(model, DATA, loss, batch_tokens=10_000)
    assert output.loss == pytest.approx(want, rel=1e-5)
    assert output.metrics["trained_tokens"] == 13
    for key, gradient in gradients(adapter).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-3, atol=1e-4)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("logits", [1 << 25, 3 * 512])
def test_cutting_and_recomputing_change_nothing(
    student: tuple[CausalModel, Adapter],
    monkeypatch: pytest.MonkeyPatch,
    checkpointing: bool,
    logits: int,
) -> None:
    model, adapter = student
    whole = step.forward_backward(model, DATA, Loss(), batch_tokens=10_000)
    wanted = gradients(adapter)
    monkeypatch.setattr(scoring, "LOGITS", logits)
    cut = step.forward_backward(model, DATA, Loss(), batch_tokens=8, checkpointing=checkpointing)
    assert whole.metrics["micro_batches"] == 1
    assert cut.metrics["micro_batches"] == 4
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
    for one, other in zip(cut.logprobs, whole.logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    for key, gradient in gradients(adapter).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-3, atol=1e-4)
    assert not any(module.training for module in model.module.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_with_the_adapter_in_their_weight_train_as_pefts_do(
    student: tuple[CausalModel, Adapter], checkpointing: bool
) -> None:
    model, adapter = student
    plain = step.forward_backward(model, DATA, Loss(), batch_tokens=10_000)
    wanted = gradients(adapter)
    layers = [*model.module.modules()]
    with adapter.trained():
        assert len([*model.module.modules()]) < len(layers)
        merged = step.forward_backward(
            model, DATA, Loss(), batch_tokens=10_000, checkpointing=checkpointing
        )
    assert [*model.module.modules()] == layers
    assert merged.loss == pytest.approx(plain.loss, rel=1e-5)
    for one, other in zip(merged.logprobs, plain.logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    for key, gradient in gradients(adapter).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("parameters", "targets"),
    [({"dtype": "bfloat16"}, "all-linear"), ({}, ["embed_tokens", "q_proj"])],
)
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")
def test_what_cannot_be_merged_trains_and_samples_as_it_is(
    tiny_model: Path, parameters: dict[str, Any], targets: Any
) -> None:
    model = load_model(str(tiny_model), parameters, where="model.parameters")
    adapter = Adapter(model, rank=4, alpha=32, targets=targets, seed=1)
    layers = [*model.module.modules()]
    for entered in (adapter.merged(), adapter.trained()):
        with entered:
            assert [*model.module.modules()] == layers
            assert model.lean is None


def test_checkpointing_computes_layers_twice(
    student: tuple[CausalModel, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = student
    calls = []
    # Before and not after: what is computed again stops at the last tensor that is needed.
    layer = model.module.model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    step.forward_backward(model, DATA, Loss(), batch_tokens=10_000, checkpointing=True)
    assert len(calls) == 2


def test_logits_exist_at_trained_positions_alone(
    student: tuple[CausalModel, Adapter],
) -> None:
    model, _ = student
    seen: list[int] = []
    model.module.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    step.forward_backward(model, DATA, Loss(), batch_tokens=10_000)
    assert seen == [13]


def test_nothing_to_train_is_no_error(student: tuple[CausalModel, Adapter]) -> None:
    model, _ = student
    empty = dataclasses.replace(DATA[0], mask=np.zeros(8, bool), advantages=np.zeros(8, np.float32))
    output = step.forward_backward(model, [empty], Loss(), batch_tokens=100)
    assert output.loss == 0
    assert output.logprobs[0].shape == (8,)
    assert step.forward_backward(model, [], Loss(), batch_tokens=100).logprobs == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": np.ones(8, bool)}, "positions count from 1"),
        ({"tokens": np.full(8, 512)}, "does not know"),
    ],
)
def test_a_datum_that_cannot_be_is_refused(
    student: tuple[CausalModel, Adapter], change: dict[str, Any], message: str
) -> None:
    model, _ = student
    with pytest.raises(FatalJobError, match=message):
        step.logprobs(model, [dataclasses.replace(DATA[0], **change)], batch_tokens=100)


def test_a_datum_past_the_context_is_refused(tiny_model: Path) -> None:
    model = load_model(str(tiny_model), {"max_model_len": 7}, where="model.parameters")
    with pytest.raises(FatalJobError, match="8 tokens, and the context"):
        step.logprobs(model, DATA, batch_tokens=100)


def test_an_unknown_loss_is_refused(start: Start, runner: asyncio.Runner) -> None:
    with pytest.raises(NotSupported, match="importance"):
        runner.run(start().forward_backward(DATA, Loss("importance")))


def test_a_gradient_that_is_not_finite_is_never_applied(
    start: Start, runner: asyncio.Runner
) -> None:
    trainer = start()
    before = runner.run(trainer.forward(DATA))
    broken = dataclasses.replace(DATA[0], advantages=np.where(DATA[0].mask, np.nan, 0).astype("f4"))
    output = runner.run(trainer.forward_backward([broken], Loss()))
    assert np.isnan(output.loss)
    with pytest.raises(FatalJobError, match="step 1 is not finite"):
        runner.run(trainer.optim_step(AdamParams(1e-2)))
    for one, other in zip(before, runner.run(trainer.forward(DATA)), strict=True):
        assert one.tobytes() == other.tobytes()
    # ... and the next step is a first one.
    runner.run(trainer.forward_backward(DATA, Loss()))
    assert runner.run(trainer.optim_step(AdamParams(1e-2)))["grad_norm"] > 0


def test_a_step_is_adams(start: Start, runner: asyncio.Runner) -> None:
    """The first step of Adam moves each weight by the learning rate against its gradient, and
    a clipped gradient moves it as far."""
    for clip in (0.0, 1e-3):
        trainer = start()
        runner.run(trainer.forward_backward(DATA, Loss()))
        adapter = trainer._adapter
        assert adapter is not None
        name = next(name for name in adapter.weights if "lora_B" in name)
        gradient = adapter.weights[name].grad
        assert gradient is not None
        gradient = gradient.clone()
        runner.run(trainer.optim_step(AdamParams(0.01, eps=1e-12, grad_clip_norm=clip)))
        sure = gradient.abs() > 1e-4
        assert sure.any()
        moved = adapter.weights[name].detach()[sure]
        torch.testing.assert_close(moved, -0.01 * gradient[sure].sign(), rtol=1e-3, atol=0)
