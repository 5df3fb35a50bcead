"""A tiny Qwen3 with a tokenizer and a chat template, made on the spot: nothing is downloaded.

Its weights are random, so what it says is noise; it is for engines, shapes and counts.
``make_tiny_model`` takes seconds; the fixture ``tiny_model`` makes one for a test session.
"""

from __future__ import annotations

__all__ = ["CHAT_TEMPLATE", "make_tiny_model", "tiny_model"]

from pathlib import Path

import pytest

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_WORDS = (
    "the a of to and in is it you that he was for on are with as his they be at one have this "
    "from or had by hot word but what some we can out other were all there when up use your how "
    "said an each she which do their time if will way about many then them write would like so "
    "these her long make thing see him two has look more day could go come did number sound no "
    "most people my over know water than call first who may down side been now find user "
    "assistant system add plus equals count 0 1 2 3 4 5 6 7 8 9"
)


def make_tiny_model(
    folder: Path,
    *,
    vocabulary: int = 512,
    hidden: int = 64,
    layers: int = 2,
    context: int = 1024,
    seed: int = 0,
) -> Path:
    """Write model, tokenizer and chat template to ``folder`` (bfloat16) and return it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = _WORDS.split()
    lines = [" ".join(words[i : i + n]) for n in (2, 3, 5, 7) for i in range(0, len(words), n)]
    tokenizer.train_from_iterator(lines * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=context,
        # Far above the usual 0.02: attention must matter, or a wrong mask would go unseen.
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model of this test session; a conftest takes it with
    ``from tests.support.tiny_model import tiny_model``."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))
