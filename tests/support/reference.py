"""What a model says by a plain forward pass, to hold engines against; and adapters to put on it."""

from __future__ import annotations

__all__ = ["check_sample", "greedy", "load_reference", "logprob_table", "make_adapter"]

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spider_worker.tokens import SampledTokens


def load_reference(model: Path, adapter: Path | None = None) -> Any:
    """The model in float32, with a PEFT adapter or without."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is None:
        return module
    import peft

    return peft.PeftModel.from_pretrained(module, str(adapter))


def logprob_table(reference: Any, tokens: Sequence[int]) -> torch.Tensor:
    """(N, V): row ``i`` is the log-distribution of token ``i``; row 0 is NaN."""
    with torch.inference_mode():
        logits = reference(torch.tensor([list(tokens)])).logits[0]
    return torch.cat([torch.full_like(logits[:1], torch.nan), logits[:-1].log_softmax(-1)])


def greedy(reference: Any, prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        with torch.inference_mode():
            tokens.append(int(reference(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def check_sample(
    reference: Any, prompt: Sequence[int], sample: SampledTokens, tolerance: float
) -> None:
    """Its log-probabilities are those that the reference gives its tokens."""
    assert sample.logprobs.dtype == np.float32
    assert sample.logprobs.shape == (len(sample.tokens),)
    want = logprob_table(reference, (*prompt, *sample.tokens))
    for at, (token, logprob) in enumerate(
        zip(sample.tokens, sample.logprobs, strict=True), len(prompt)
    ):
        assert logprob == pytest.approx(want[at, token].item(), abs=tolerance)


def make_adapter(model: Path, folder: Path, *, seed: int, rank: int = 4) -> Path:
    """A LoRA adapter of random weights on all linear layers, large enough to change what the
    model says, in PEFT's format."""
    import peft

    generator = torch.Generator().manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    adapted: Any = peft.get_peft_model(load_reference(model), config)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0.0, 0.1, generator=generator)
    adapted.save_pretrained(folder)
    return folder
