"""Families of models whose layers or logits are not as Qwen3's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spider_sdk.errors import FatalJobError, NotSupported
from spider_worker.engines.tokens.torch_engine import TorchTokenEngine
from spider_worker.tokens import SampleParams
from spider_worker.torch_models import lean
from spider_worker.torch_models.causal import load_model
from spider_worker.torch_models.decoding import Row, decode
from spider_worker.torch_models.drawing import uniforms
from spider_worker.torch_models.scoring import micro_batches

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def make(folder: Path, family: str) -> Path:
    import transformers

    sizes = dict(SIZES)
    if family == "Gemma2":  # sliding layers, and logits that are capped
        sizes |= {"sliding_window": 4, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}
    if family == "Mistral":  # a sliding window in every layer
        sizes |= {"sliding_window": 4}
    if family == "Llama":  # biases everywhere
        sizes |= {"attention_bias": True, "mlp_bias": True}
    if family == "Qwen3":  # several heads of keys
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    if family == "GPT2":  # learned positions
        sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64,
                 "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**sizes, pad_token_id=0)
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # norms begin with ones and biases with zeros, which hide a lot
                weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GPT2"])
def test_a_tokens_cache_is_as_large_as_it_is_said_to_be(tmp_path: Path, family: str) -> None:
    model = load_model(str(make(tmp_path, family)), {"device": "cpu"}, where="model.parameters")
    made = model.module(torch.tensor([[1, 2, 3]])).past_key_values
    layers = [(layer.keys, layer.values) for layer in made.layers]
    assert sum(one.nbytes for pair in layers for one in pair) == 3 * (model.cache_bytes or 0)
    # As models of a repository's own code may have it.
    model.config = SimpleNamespace(num_attention_heads=2, num_key_value_heads=[1, 2])
    assert model.cache_bytes is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Gemma2", "Mistral", "GPT2"])
def test_samples_and_scores_are_the_models(tmp_path: Path, family: str, attention: str) -> None:
    """Prompts of several lengths, rows that end early, and longer than a sliding window."""
    from transformers import AutoModelForCausalLM

    folder = make(tmp_path, family)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    prompts = [(5, 9, 30), (5, 9, 30, 41, 8, 17, 44, 1, 2), (7,)]

    async def story() -> Any:
        engine = TorchTokenEngine(str(folder), parameters={"attn_implementation": attention})
        await engine.start()
        params = SampleParams(14, stop=tuple(range(40, 44)), seed=1)
        groups = await asyncio.gather(*(engine.sample(p, 4, params) for p in prompts))
        wholes = [(*p, *s.tokens) for p, g in zip(prompts, groups, strict=True) for s in g]
        scores = await asyncio.gather(*(engine.compute_logprobs(whole) for whole in wholes))
        await engine.close()
        return [s for group in groups for s in group], wholes, scores

    samples, wholes, scores = asyncio.run(story())
    assert len({len(sample.tokens) for sample in samples}) > 2
    for sample, whole, score in zip(samples, wholes, scores, strict=True):
        tokens = torch.tensor([whole])
        with torch.inference_mode():
            table = plain(tokens).logits[0, :-1].log_softmax(-1)
        want = table.gather(1, tokens[0, 1:, None])[:, 0].numpy()
        np.testing.assert_allclose(score.logprobs[1:], want, atol=1e-4)
        np.testing.assert_allclose(sample.logprobs, want[-len(sample.tokens) :], atol=1e-4)


@pytest.mark.parametrize(
    ("family", "parameters", "fits"),
    [
        ("Llama", {}, True),
        ("Qwen2", {}, True),
        ("Qwen3", {}, True),
        ("Mistral", {}, False),  # a sliding window
        ("Gemma2", {}, False),
        ("GPT2", {}, False),
        ("Llama", {"attn_implementation": "eager"}, False),
        ("Llama", {"dtype": "bfloat16"}, False),
    ],
)
def test_lean_steps_serve_whom_they_fit_and_change_nothing(
    tmp_path: Path, family: str, parameters: dict[str, Any], fits: bool
) -> None:
    model = load_model(str(make(tmp_path, family)), parameters, where="model.parameters")
    assert (model.lean is not None) is fits
    prompts = [(5, 9, 30)] * 3 + ([(5, 9, 30, 41, 8, 17)] * 3 if model.takes_masks else [])
    rows = [Row(p, 20, uniforms(p, 1, number, 20)) for number, p in enumerate(prompts)]
    params = SampleParams(20, stop=tuple(range(40, 44)))
    found = decode(model, rows, params)
    model.may_be_lean = False
    for one, other in zip(found, decode(model, rows, params), strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_lean_steps_that_disagree_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path, "Llama")
    normed = lean._normed
    monkeypatch.setattr(lean, "_normed", lambda *a: normed(*a) * 1.01)
    assert load_model(str(folder), {}, where="model.parameters").lean is None


def test_logits_made_in_a_way_that_is_not_known_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    folder = make(tmp_path, "Llama")
    plain = LlamaForCausalLM.forward

    def doubled(self: Any, *args: Any, **options: Any) -> Any:
        output = plain(self, *args, **options)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    with pytest.raises(NotSupported, match="makes its logits"):
        load_model(str(folder), {}, where="model.parameters")


def test_logits_that_are_not_finite_are_said_to_be_so(tmp_path: Path) -> None:
    model = load_model(str(make(tmp_path, "Llama")), {}, where="model.parameters")
    with torch.no_grad():
        model.module.model.norm.weight.fill_(torch.nan)
    rows = [Row((1, 2), 3, np.full(3, 0.5))]
    with pytest.raises(FatalJobError, match="not finite"):
        decode(model, rows, SampleParams(3))


@pytest.mark.parametrize(
    ("lengths", "budget", "batches"),
    [
        ([], 10, []),
        ([3, 1, 2, 2], 6, [[1, 2, 3], [0]]),
        ([3, 1, 2, 2], 12, [[1, 2, 3, 0]]),
        ([30, 40], 10, [[0], [1]]),
    ],
)
def test_micro_batches_stay_under_their_budget(
    lengths: list[int], budget: int, batches: list[list[int]]
) -> None:
    assert micro_batches(lengths, budget) == batches
