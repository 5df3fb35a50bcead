"""Train the models of the demo's second job: a teacher that adds, a student that mostly cannot.

Both are small Qwen3-style transformers that answer "Reverse 47+85" with "It is 231." (132, last
digit first, is what a model this small learns soonest). They share neither tokenizer nor chat
template: the teacher reads and writes single characters, the student whole phrases and single
digits. The teacher learns the sums; the student learns from sums that are too large by up to
``--error``, each error as likely as none, so it has all that addition takes but for the right
answer. A fifth of the pairs is held out from both; those are the questions of ``sums.jsonl``, which
the demo distils on and evaluates with.

The script fails unless the teacher answers nearly all held-out pairs and the student few. One seed
decides everything, and a few minutes on two CPU cores are enough::

    python scripts/train_distil_models.py --out config/demo
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from train_demo_model import IGNORED, Pair, build_model, save, train
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

QUESTION = "Reverse {a}+{b}"
ANSWER = "It is {digits}."
HELD_OUT = 1600  #: pairs, of the 8,100 of two-digit numbers

TEACHER_SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
TEACHER_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
STUDENT_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
STUDENT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def teacher_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, so a token a character of the demo's texts."""
    return _tokenizer([], TEACHER_SPECIAL, TEACHER_TEMPLATE)


def student_tokenizer() -> PreTrainedTokenizerFast:
    """Whatever stands between two digits is one token, and so is every digit."""
    texts = [QUESTION.format(a=7, b=7), ANSWER.format(digits=7)]
    texts += ["user\n", "assistant\n", "system\n"]
    return _tokenizer(texts, STUDENT_SPECIAL, STUDENT_TEMPLATE)


def _tokenizer(
    texts: Sequence[str], special: Sequence[str], template: str
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with as many merges as ``texts`` have in them. The first of ``special`` pads,
    the last ends a turn."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=special[-1], pad_token=special[0]
    )
    tokenizer.chat_template = template
    tokenizer.model_max_length = 256
    return tokenizer


def split_pairs(seed: int) -> tuple[list[Pair], list[Pair]]:
    """All pairs of 10 to 99 as (training, held out)."""
    pairs = list(itertools.product(range(10, 100), repeat=2))
    random.Random(seed).shuffle(pairs)
    return pairs[HELD_OUT:], pairs[:HELD_OUT]


def answer(number: int) -> str:
    return ANSWER.format(digits=str(number)[::-1])


def prompt(tokenizer: PreTrainedTokenizerFast, pair: Pair) -> list[int]:
    chat = [{"role": "user", "content": QUESTION.format(a=pair[0], b=pair[1])}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def training_table(
    tokenizer: PreTrainedTokenizerFast, pairs: list[Pair], errors: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(ids, labels)``, both [rows, tokens], padded on the right: each pair with the sum that is
    off by each of ``errors``."""
    rows = []
    for pair in pairs:
        question = prompt(tokenizer, pair)
        for error in errors:
            text = answer(sum(pair) + error) + tokenizer.eos_token
            rows.append((question, tokenizer.encode(text, add_special_tokens=False)))
    width = max(len(question) + len(reply) for question, reply in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), IGNORED)
    for number, (question, reply) in enumerate(rows):
        begin, end = len(question), len(question) + len(reply)
        ids[number, :end] = torch.tensor([*question, *reply])
        labels[number, begin:end] = torch.tensor(reply)
    return ids, labels


@torch.no_grad()
def accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]
) -> float:
    """Share of ``pairs`` whose greedy answer is right, through ``generate``. All prompts of one
    tokenizer are equally long, since all operands are."""
    model.eval()
    ids = torch.tensor([prompt(tokenizer, pair) for pair in pairs])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
    )
    texts = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
    right = [text == answer(sum(pair)) for text, pair in zip(texts, pairs, strict=True)]
    return sum(right) / len(pairs)


def make(
    name: str,
    build: Callable[[], PreTrainedTokenizerFast],
    pairs: list[Pair],
    errors: Sequence[int],
    *,
    steps: int,
    seed: int,
) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    tokenizer = build()
    model = build_model(tokenizer)
    print(f"{name}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    train(model, *training_table(tokenizer, pairs, errors), steps=steps, seed=seed)
    return model


def write_sums(path: Path, pairs: list[Pair]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for a, b in pairs:
            file.write(json.dumps({"question": QUESTION.format(a=a, b=b)}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("config/demo"))
    parser.add_argument("--teacher-steps", type=int, default=1200)
    parser.add_argument("--student-steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--error", type=int, default=6, help="most that the student's sums are off")
    parser.add_argument("--teacher-least", type=float, default=0.99, help="accuracy, held out")
    parser.add_argument("--student-most", type=float, default=0.18, help="accuracy, held out")
    args = parser.parse_args()

    seen, held_out = split_pairs(args.seed)
    errors = range(args.error + 1)
    steps = args.teacher_steps
    teacher = make("teacher", teacher_tokenizer, seen, [0], steps=steps, seed=args.seed)
    knows = accuracy(teacher, teacher_tokenizer(), held_out)
    print(f"teacher: {knows:.2%} of {len(held_out)} held-out sums", flush=True)
    steps = args.student_steps
    student = make("student", student_tokenizer, seen, errors, steps=steps, seed=args.seed)
    guesses = accuracy(student, student_tokenizer(), held_out)
    print(f"student: {guesses:.2%} of {len(held_out)} held-out sums", flush=True)
    if knows < args.teacher_least or guesses > args.student_most:
        print(
            f"wanted: teacher {args.teacher_least:.0%} or more, student {args.student_most:.0%} or"
            " less; nothing saved",
            file=sys.stderr,
        )
        return 1
    save(teacher, teacher_tokenizer(), args.out / "teacher")
    save(student, student_tokenizer(), args.out / "student")
    write_sums(args.out / "sums.jsonl", held_out)
    for name in ("teacher", "student"):
        size = sum(path.stat().st_size for path in (args.out / name).iterdir())
        print(f"saved to {args.out / name} ({size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
