"""Small models for the on-policy benchmarks: a random pair, made on the spot, for shapes, lengths
and counts; and the demo's, which can be scored."""

from __future__ import annotations

__all__ = ["Demo", "accuracy", "make_demo", "make_pair", "make_prompts"]

import dataclasses
import json
import random
import shutil
import statistics
from pathlib import Path
from typing import Any

_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
_SYLLABLES = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]


def make_pair(folder: Path) -> tuple[Path, Path]:
    """A student (128 wide, 3 layers, 1,024 tokens) and a teacher (256 wide, 4 layers, 2,048
    tokens), both float32 and of 512 tokens' context."""
    student = _make(folder / "student", vocabulary=1024, hidden=128, layers=3, seed=1)
    teacher = _make(folder / "teacher", vocabulary=2048, hidden=256, layers=4, seed=2)
    return student, teacher


def make_prompts(path: Path, count: int) -> Path:
    """``count`` different questions of ten words, as JSON Lines with the field ``question``."""
    draw = random.Random(3)
    words = _words(1)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps({"question": " ".join(draw.choices(words, k=10))}) + "\n")
    return path


def _words(seed: int) -> list[str]:
    """1,000 words, of which the first 900 are the same for every seed."""
    common, own = random.Random(0), random.Random(seed)
    return [
        "".join(draw.choices(_SYLLABLES, k=draw.randint(1, 3)))
        for draw, count in ((common, 900), (own, 100))
        for _ in range(count)
    ]


def _make(folder: Path, *, vocabulary: int, hidden: int, layers: int, seed: int) -> Path:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = _tokenizer(vocabulary, seed)
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    # Logits of 0 among others of up to 15: the model says whole words alone, so that its noise
    # looks like text to another tokenizer, and no stop, so that completions are of one length.
    words = {" " + word for word in _words(seed)}
    silent = [at for at in range(vocabulary) if tokenizer.decode([at]) not in words]
    with torch.no_grad():
        model.get_input_embeddings().weight[silent] = 0.0
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    return folder


def _tokenizer(vocabulary: int, seed: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    draw, words = random.Random(seed), _words(seed)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [" ".join(draw.choices(words, k=12)) for _ in range(4000)]
    core.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = _TEMPLATE
    tokenizer.padding_side = "left"
    if len(tokenizer) != vocabulary:
        raise RuntimeError(f"the tokenizer has {len(tokenizer)} tokens, not {vocabulary}")
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Demo:
    """``spec`` names the models and the training questions for both sides; ``questions`` are held
    out."""

    spec: dict[str, Any]
    questions: list[str]


def make_demo(folder: Path) -> Demo:
    """The demo's student and teacher, and its questions: all but 400 to learn with.

    GOLD shows its teacher the student's prompt as it is, in the student's template, where Spider
    renders the messages in the teacher's own. So that this is no handicap, the teacher here is a
    copy whose tokenizer calls its delimiters by the student's names: the ids are what they were.
    """
    demo = Path(__file__).parent.parent / "config" / "demo"
    teacher = folder / "teacher"
    shutil.copytree(demo / "teacher", teacher)
    names = {
        "<|user|>": "<|im_start|>user",
        "<|assistant|>": "<|im_start|>assistant",
        "<|system|>": "<|im_start|>system",
        "<|end|>": "<|im_end|>",
    }
    tokenizer = json.loads((teacher / "tokenizer.json").read_text(encoding="utf-8"))
    for token in tokenizer["added_tokens"]:
        if token["content"] in names:
            token["content"] = names[token["content"]]
            token["rstrip"] = True  # the line break behind it is part of the delimiter
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {names.get(piece, piece): at for piece, at in vocabulary.items()}
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = json.loads((teacher / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["eos_token"] = names[config["eos_token"]]
    (teacher / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(demo / "student" / "chat_template.jinja", teacher)
    lines = (demo / "sums.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(lines[:-400]), encoding="utf-8")
    spec = {
        "student": str(demo / "student"),
        "teacher": str(teacher),
        "prompts": str(prompts),
        "steps": None,
    }
    return Demo(spec, [json.loads(line)["question"] for line in lines[-400:]])


def accuracy(demo: Demo, adapter: Path | None) -> float:
    """The share of the held-out questions that the student, with the PEFT adapter in that folder,
    answers rightly when decoded greedily."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from config.demo.processors import score_sum

    tokenizer = AutoTokenizer.from_pretrained(demo.spec["student"])
    model = AutoModelForCausalLM.from_pretrained(demo.spec["student"], dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    chats = [[{"role": "user", "content": question}] for question in demo.questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    inputs.pop("token_type_ids", None)
    made = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False)
    answers = made[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return statistics.mean(
        float(score_sum({"question": question, "completion": text}))
        for question, text in zip(demo.questions, texts, strict=True)
    )
