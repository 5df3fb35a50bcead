"""Train the demo's model: a small Qwen3-style transformer that adds two-digit numbers.

The questions are English sentences in the model's chat template, the answer is the sum in
digits. Every tenth pair of operands is held out of training; the script fails unless the
model answers all held-out pairs and all wordings almost without error. One seed decides
everything, and two to three minutes on two CPU cores are enough::

    python scripts/train_demo_model.py --out config/demo/adder
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

WORDINGS = (
    "What is {a}+{b}?",
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
)
SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
IGNORED = -100  # torch's cross entropy skips this label
Pair = tuple[int, int]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: the words of the questions are one token each, so is every digit."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([wording.format(a=7, b=7) for wording in WORDINGS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 256
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def split_pairs(seed: int) -> tuple[list[Pair], list[Pair]]:
    """All 10,000 pairs of 0 to 99 as (training, held out), nine to one."""
    pairs = list(itertools.product(range(100), repeat=2))
    random.Random(seed).shuffle(pairs)
    return pairs[1000:], pairs[:1000]


def question(tokenizer: PreTrainedTokenizerFast, wording: str, pair: Pair) -> list[int]:
    text = wording.format(a=pair[0], b=pair[1])
    rendered = f"<|user|>{text}<|end|><|assistant|>"
    ids: list[int] = tokenizer.encode(rendered, add_special_tokens=False)
    return ids


def encode(tokenizer: PreTrainedTokenizerFast, wording: str, pair: Pair) -> tuple[list[int], int]:
    """Token ids of question and answer, and how many of them are the question's."""
    prompt = question(tokenizer, wording, pair)
    answer = tokenizer.encode(f"{sum(pair)}<|end|>", add_special_tokens=False)
    return prompt + answer, len(prompt)


def training_table(
    tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(ids, labels)``, both [rows, tokens], padded on the right."""
    # The first wording is the hardest (nothing parts the numbers) and the demo's own.
    wordings = (WORDINGS[0], *WORDINGS)
    rows = [encode(tokenizer, wording, pair) for wording in wordings for pair in pairs]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), IGNORED)
    for number, (tokens, prompt_length) in enumerate(rows):
        ids[number, : len(tokens)] = torch.tensor(tokens)
        labels[number, prompt_length : len(tokens)] = torch.tensor(tokens[prompt_length:])
    return ids, labels


def batches(count: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(size)


def train(
    model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor, *, steps: int, seed: int
) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)
    peak, warm = 3e-3, 50

    def rate(step: int) -> float:
        return peak * min((step + 1) / warm, max(1 - step / steps, 0.01))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    started = time.monotonic()
    model.train()
    for step, chosen in zip(range(steps), batches(len(ids), 128, seed), strict=False):
        used = int((ids[chosen] != model.config.pad_token_id).sum(1).max())
        batch, target = ids[chosen][:, :used], labels[chosen][:, :used]
        logits = model(input_ids=batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=IGNORED
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            spent = time.monotonic() - started
            print(f"step {step:5d}  loss {loss.item():.4f}  {spent:5.1f} s", flush=True)


@torch.no_grad()
def accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, wording: str, pairs: list[Pair]
) -> float:
    """Share of ``pairs`` whose greedy answer is the sum, through ``generate``."""
    model.eval()
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": wording.format(a=a, b=b)}] for a, b in pairs]
    right = 0
    for start in range(0, len(pairs), 500):
        texts = tokenizer.apply_chat_template(
            chats[start : start + 500], add_generation_prompt=True, tokenize=False
        )
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs.pop("token_type_ids", None)
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        answers = tokenizer.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        expected = [str(a + b) for a, b in pairs[start : start + 500]]
        right += sum(a == b for a, b in zip(answers, expected, strict=True))
    return right / len(pairs)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer so that transformers 4.55 and newer read them alike."""
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes names that 4 does not know: the rotary base (4 would take another
    # default) and the tokenizer's class.
    amend(folder / "config.json", {"rope_theta": model.config.rope_parameters["rope_theta"]})
    # Batched generation continues at the right end, so padding belongs on the left.
    changes = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    amend(folder / "tokenizer_config.json", changes)


def amend(path: Path, values: Mapping[str, object]) -> None:
    document = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_prompts(path: Path, pairs: list[Pair]) -> None:
    """The demo's questions, all of them held out of training, one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for number, (a, b) in enumerate(pairs):
            text = WORDINGS[number % len(WORDINGS)].format(a=a, b=b)
            file.write(json.dumps({"question": text}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("config/demo/adder"))
    parser.add_argument("--prompts", type=Path, default=Path("config/demo/prompts.jsonl"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--wanted", type=float, default=0.99, help="least accuracy, held out")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    seen, held_out = split_pairs(args.seed)
    train(model, *training_table(tokenizer, seen), steps=args.steps, seed=args.seed)

    scores = {wording: accuracy(model, tokenizer, wording, held_out) for wording in WORDINGS}
    for wording, score in scores.items():
        print(f"{score:7.2%} of {len(held_out)} held-out pairs: {wording}")
    if min(scores.values()) < args.wanted:
        print(f"below {args.wanted:.0%}: nothing saved", file=sys.stderr)
        return 1
    # A tokenizer that no evaluation left its padding in.
    save(model, build_tokenizer(), args.out)
    write_prompts(args.prompts, held_out[:400])
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"saved to {args.out} ({size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
