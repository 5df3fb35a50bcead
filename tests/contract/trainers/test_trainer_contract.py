"""What every trainer does, whichever library trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spider_sdk.errors import FatalJobError
from spider_worker.trainers.base import AdamParams, Datum, DenseTargets, Loss, Trainer
from tests.contract.trainers.conftest import Kind, Run
from tests.support.training import PROMPTS, datum, roll_out

Start = Callable[..., Trainer]
ADAM = AdamParams(learning_rate=1e-2)
FIXED = [
    datum(PROMPTS[0], (8, 17, 44, 44), (-3.0, -4.0, -5.0, -6.0), (1.0, -0.5, 0.25, 2.0)),
    datum(PROMPTS[1], (200, 9), (-2.0, -7.0), (0.5, 0.5)),
    datum(PROMPTS[2], (1, 2, 3, 4, 5, 6), (-6.0,) * 6, (-1.0, 1.0, -1.0, 1.0, -1.0, 1.0)),
]


def masked(values: Any, data: list[Datum]) -> np.ndarray:
    return np.concatenate([v[d.mask] for v, d in zip(values, data, strict=True)])


async def on_policy(trainer: Trainer, seed: int = 3) -> list[Datum]:
    samples = await roll_out(await trainer.sampler(), seed=seed)
    return [datum(prompt, s.tokens, s.logprobs) for prompt, s in samples]


async def train(trainer: Trainer, seeds: range) -> list[Any]:
    """On-policy steps whose advantages depend on the samples; what each measured."""
    story: list[Any] = []
    for seed in seeds:
        data = [
            dataclasses.replace(d, advantages=np.where(d.mask, d.tokens % 3 - 1.0, 0).astype("f4"))
            for d in await on_policy(trainer, seed)
        ]
        output = await trainer.forward_backward(data, Loss("importance_sampling"))
        await trainer.optim_step(ADAM)
        story.append(
            (output.loss, [d.tokens.tolist() for d in data], masked(output.logprobs, data))
        )
    return story


def test_info_says_what_is_trained(start: Start) -> None:
    info = start(lora_rank=2).info
    assert info.lora_rank == 2
    assert info.base_model
    assert info.tokenizer


def test_the_logprobs_of_a_sample_are_the_policys(start: Start, kind: Kind, run: Run[Any]) -> None:
    trainer = start()
    data = run(on_policy(trainer))
    np.testing.assert_allclose(
        masked(run(trainer.forward(data)), data),
        masked([d.logprobs for d in data], data),
        atol=kind.tolerance,
    )


def test_each_logprob_stands_at_its_own_token(start: Start, kind: Kind, run: Run[Any]) -> None:
    """A fresh student is its base model, whose plain forward pass is what counts."""
    import torch
    from transformers import AutoModelForCausalLM

    trainer = start()
    found = run(trainer.forward(FIXED))
    model = AutoModelForCausalLM.from_pretrained(kind.folder, dtype=torch.float32)
    for logprobs, d in zip(found, FIXED, strict=True):
        assert logprobs.shape == d.tokens.shape
        assert logprobs.dtype == np.float32
        tokens = torch.from_numpy(d.tokens)
        with torch.inference_mode():
            table = model(tokens[None]).logits[0].log_softmax(-1)
        for position in np.flatnonzero(d.mask):
            want = table[position - 1, tokens[position]].item()
            assert logprobs[position] == pytest.approx(want, abs=kind.tolerance)


def test_forward_backward_gives_the_logprobs_of_forward(
    start: Start, kind: Kind, run: Run[Any]
) -> None:
    trainer = start()
    output = run(trainer.forward_backward(FIXED, Loss()))
    np.testing.assert_allclose(
        masked(output.logprobs, FIXED), masked(run(trainer.forward(FIXED)), FIXED), atol=1e-5
    )


@pytest.mark.parametrize("name", ["importance_sampling", "ppo"])
def test_on_its_own_samples_a_loss_is_minus_the_sum_of_advantages(
    start: Start, run: Run[Any], name: str
) -> None:
    trainer = start()
    data = run(on_policy(trainer))
    output = run(trainer.forward_backward(data, Loss(name)))
    assert output.loss == pytest.approx(-sum(d.advantages.sum() for d in data), rel=1e-3)


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo"])
def test_a_step_makes_rewarded_tokens_likelier(start: Start, run: Run[Any], name: str) -> None:
    trainer = start()
    data = run(on_policy(trainer))
    before = masked(run(trainer.forward(data)), data).sum()
    run(trainer.forward_backward(data, Loss(name)))
    run(trainer.optim_step(ADAM))
    assert masked(run(trainer.forward(data)), data).sum() > before + 0.1


def test_after_a_step_the_next_sampler_samples_from_the_new_weights(
    start: Start, kind: Kind, run: Run[Any]
) -> None:
    trainer = start()
    first = run(on_policy(trainer))
    run(trainer.forward_backward(first, Loss()))
    run(trainer.optim_step(ADAM))
    second = run(on_policy(trainer))
    np.testing.assert_allclose(
        masked(run(trainer.forward(second)), second),
        masked([d.logprobs for d in second], second),
        atol=kind.tolerance,
    )


def test_gradients_add_up_until_the_step(start: Start, kind: Kind, run: Run[Any]) -> None:
    whole, parts = start(), start()
    one = run(whole.forward_backward(FIXED, Loss()))
    two = [run(parts.forward_backward([d], Loss())) for d in FIXED]
    assert one.loss == pytest.approx(sum(output.loss for output in two), rel=1e-3)
    for trainer in (whole, parts):
        run(trainer.optim_step(ADAM))
    np.testing.assert_allclose(
        masked(run(whole.forward(FIXED)), FIXED),
        masked(run(parts.forward(FIXED)), FIXED),
        atol=10 * kind.tolerance,
    )


@pytest.mark.parametrize("objective", ["cross_entropy", "jsd"])
def test_dense_targets_pull_the_student_to_them(
    start: Start, run: Run[Any], objective: Any
) -> None:
    trainer = start()
    if objective not in trainer.info.dense:
        pytest.skip(f"this trainer has no {objective}")
    targets = DenseTargets(
        positions=np.array([4, 6]),
        ids=np.array([[8, 9], [44, -1]]),
        probs=np.array([[0.75, 0.25], [1.0, 0.0]], np.float32),
        weights=np.ones(2, np.float32),
        objective=objective,
    )
    data = [datum(PROMPTS[0], (8, 17, 44), advantages=0.0, targets=targets)]
    losses = []
    for _ in range(3):
        losses.append(run(trainer.forward_backward(data, Loss())).loss)
        run(trainer.optim_step(ADAM))
    assert losses[0] > losses[1] > losses[2] > 0


def test_a_resumed_run_goes_on_as_an_unbroken_one(
    start: Start, kind: Kind, run: Run[Any], tmp_path: Path
) -> None:
    unbroken = start()
    run(train(unbroken, range(3)))
    state = run(unbroken.save_state(tmp_path))
    want = run(train(unbroken, range(3, 6)))
    resumed = start(seed=8)
    run(resumed.load_state(state, tmp_path))
    have = run(train(resumed, range(3, 6)))
    for (loss, tokens, logprobs), (its_loss, its_tokens, its_logprobs) in zip(
        want, have, strict=True
    ):
        assert tokens == its_tokens
        if kind.exact:
            assert loss == its_loss
            assert logprobs.tobytes() == its_logprobs.tobytes()
        else:
            assert loss == pytest.approx(its_loss, rel=1e-3)


def test_a_state_of_another_rank_is_refused(start: Start, run: Run[Any], tmp_path: Path) -> None:
    state = run(start(lora_rank=4).save_state(tmp_path))
    with pytest.raises(FatalJobError, match=r"4.*2|2.*4"):
        run(start(lora_rank=2).load_state(state, tmp_path))


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_the_adapter_loads_with_peft_and_says_the_same(
    start: Start, kind: Kind, run: Run[Any], tmp_path: Path
) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    trainer = start()
    run(train(trainer, range(2)))
    run(trainer.save_adapter(tmp_path))
    base = AutoModelForCausalLM.from_pretrained(kind.folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path))
    assert model.peft_config["default"].base_model_name_or_path == trainer.info.base_model
    for logprobs, d in zip(run(trainer.forward(FIXED)), FIXED, strict=True):
        tokens = torch.from_numpy(d.tokens)
        with torch.inference_mode():
            table = model(tokens[None]).logits[0].log_softmax(-1)
        want = table[:-1].gather(1, tokens[1:, None])[:, 0].numpy()
        np.testing.assert_allclose(logprobs[d.mask], want[d.mask[1:]], atol=kind.tolerance)
