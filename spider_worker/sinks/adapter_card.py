"""The model card (README.md) of a distilled adapter.

Ours are one section between two marks and some keys of the YAML front matter; a card that its
user went on writing keeps all else. No licence is ever written: what may be done with an adapter
depends on the terms of its base model, of its teachers and of the data.
"""

from __future__ import annotations

__all__ = ["adapter_card", "keep_card"]

import dataclasses
import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import yaml

from spider_sdk.config.model import JobConfig, OnPolicyOptions, TeacherConfig
from spider_worker.sinks import front_matter

TAGS: Final = ("spider", "distillation", "on-policy-distillation", "lora")
SECTION: Final = "adapter"

_HUB_ID: Final = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*|[\w-][\w.-]*")
_DATASET: Final = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
#: The ranks that vllm takes as a bound.
_VLLM_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
_ENDS: Final = {
    "data": "the end of the data",
    "token_budget": "its token budget",
    "cancelled": "a cancel",
}
#: What a student learns from where a teacher gives distributions, by its signal.
_OBJECTIVES: Final = {
    "full": "the Jensen–Shannon divergence from the teacher's distribution",
    "topk": "the cross-entropy with the teacher's most probable tokens",
}
_FIGURES: Final = (
    ("eval/kl", "Held-out reverse KL, nats a token"),
    ("eval/kl_per_sample", "Held-out reverse KL, nats a sample"),
    ("kl", "Reverse KL of the last batch, nats a token"),
    ("loss_per_token", "Loss a token"),
    ("entropy", "Entropy of the student, nats a token"),
    ("stop_kl", "KL at the stop token, nats"),
    ("length_mean", "Mean length of a sample, tokens"),
    ("truncated", "Share of samples cut at max_tokens"),
    ("coverage", "Share of tokens that could be compared"),
)


def adapter_card(job: JobConfig, facts: Mapping[str, Any]) -> str:
    """The card of a new repository.

    ``facts``: ``steps``; ``final``, the last record of ``metrics.jsonl``; and where they are
    known ``base_model`` (what the worker loaded: an absolute path says that the name is none of
    the Hub), ``tokens`` (sampled), ``ended``, ``seed``, ``checkpoints`` (steps), ``signals`` (what
    each teacher was asked for, by its name) and ``files`` (names that stand beside the card).
    """
    options = job.generation.on_policy_options
    assert options is not None
    base = str(facts.get("base_model") or job.model.name)
    hub_base = base if _HUB_ID.fullmatch(base) else None
    shown = hub_base or _last_part(job.model.name)
    repo_id = job.output.hf.repo_id if job.output.hf else None
    title = repo_id.rpartition("/")[2] if repo_id else f"{_last_part(shown)}, distilled"
    parts = [
        _summary(job, options, facts, shown, hub_base is not None),
        _results(facts),
        _use(repo_id or "PATH/TO/adapter", shown, options.lora_rank, hub_base is not None),
        _checkpoints(facts.get("checkpoints") or (), repo_id),
        _recipe(job, options, shown),
    ]
    section = "\n\n".join(part for part in parts if part) + "\n"
    front = front_matter.dump(_front(job, options, facts, hub_base))
    body = front_matter.with_section(f"# {title}", SECTION, section)
    return f"---\n{front}---\n{body}"


def keep_card(existing: str | None, card: str) -> str:
    """``card`` with what a user wrote into the one that stands in the repository. Raises
    FatalJobError where that cannot be read; keeping its own result again changes nothing."""
    front, body = front_matter.split(existing or "", "model")
    if not front and not body.strip():
        return card
    text, ours = front_matter.split(card, "model")
    values = yaml.safe_load(text)
    for key in ("tags", "datasets"):
        if key in values:
            values[key] = front_matter.with_names(front, key, values[key])
    # A base model on the Hub that another run named is no longer this adapter's.
    values.setdefault("base_model", None)
    values.setdefault("base_model_relation", None)
    edited = front_matter.edit(front, values)
    section = front_matter.section_of(ours, SECTION)
    return f"---\n{edited}---\n{front_matter.with_section(body, SECTION, section)}"


def _front(
    job: JobConfig, options: OnPolicyOptions, facts: Mapping[str, Any], base: str | None
) -> dict[str, Any]:
    front: dict[str, Any] = {}
    if base is not None:
        front |= {"base_model": base, "base_model_relation": "adapter"}
    front |= {"library_name": "peft", "pipeline_tag": "text-generation"}
    if _on_hub(job):
        front["datasets"] = [job.source.dataset]
    front["tags"] = list(TAGS)
    front["spider"] = {
        "version": importlib.metadata.version("spider-distill"),
        "teachers": [_shown(teacher) for teacher in options.teacher],
        "steps": facts["steps"],
    }
    return front


def _on_hub(job: JobConfig) -> bool:
    return not job.source.inputs and _DATASET.fullmatch(job.source.dataset) is not None


def _summary(
    job: JobConfig, options: OnPolicyOptions, facts: Mapping[str, Any], base: str, linked: bool
) -> str:
    version = importlib.metadata.version("spider-distill")
    source = job.source
    data = f"`{_last_part(source.dataset)}`"
    if _on_hub(job):
        data = f"[{source.dataset}](https://huggingface.co/datasets/{source.dataset})"
    config = f", configuration `{source.config_name}`" if source.config_name else ""
    revision = f", revision `{source.revision}`" if source.revision else ""
    model = f"[{base}](https://huggingface.co/{base})" if linked else f"`{base}`, a local model"
    rows = [("Base model", model)]
    label = "Teacher" if len(options.teacher) == 1 else "Teachers"
    signals: Mapping[str, str] = facts.get("signals") or {}
    described = (_described(teacher, signals.get(teacher.name)) for teacher in options.teacher)
    rows.append((label, "<br>".join(described)))
    rows.append(("Data", f"{data}{config}, split `{source.split}`{revision}"))
    rows.append(("Steps", f"{facts['steps']:,}"))
    if facts.get("tokens") is not None:
        rows.append(("Sampled tokens", f"{facts['tokens']:,}"))
    if facts.get("seed") is not None:
        rows.append(("Seed", str(facts["seed"])))
    if facts.get("ended"):
        rows.append(("Ended by", _ENDS.get(facts["ended"], facts["ended"])))
    lines = [
        f"A LoRA adapter (rank {options.lora_rank}), distilled on-policy with Spider {version}: "
        "the student sampled, the teacher scored every token of what it had sampled, and the "
        f"student learnt from {_objective(signals)}.",
        "",
        *_table("", "", rows),
    ]
    return "\n".join(lines)


def _objective(signals: Mapping[str, str]) -> str:
    dense = [said for signal, said in _OBJECTIVES.items() if signal in signals.values()]
    plain = "the reverse KL on its own tokens"
    if not dense:
        return plain
    return (
        f"{' or '.join(dense)} where both could be compared token by token, elsewhere from {plain}"
    )


def _described(teacher: TeacherConfig, signal: str | None) -> str:
    said = [f"`{_shown(teacher)}`"]
    if signal is not None:
        said.append(f"signal {signal}")
    if teacher.weight != 1.0:
        said.append(f"weight {teacher.weight:g}")
    if teacher.when:
        conditions = json.dumps(dict(teacher.when), ensure_ascii=False)
        said.append(f"for rows with `{conditions}`")
    return ", ".join(said)


def _shown(teacher: TeacherConfig) -> str:
    """A folder of a worker's is nobody else's business."""
    name = teacher.name
    return name if _HUB_ID.fullmatch(name) or "://" in name else _last_part(name)


def _last_part(name: str) -> str:
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or name


def _results(facts: Mapping[str, Any]) -> str:
    final: Mapping[str, Any] = facts.get("final") or {}
    known = [(label, final.get(name)) for name, label in _FIGURES]
    ours = {name for name, _ in _FIGURES} | {"eval/coverage", "eval/prompts_refused"}
    scores = [
        (f"Held-out {name.removeprefix('eval/')}, by the evaluator", value)
        for name, value in final.items()
        if name.startswith("eval/") and name not in ours and not name.startswith("eval/kl/")
    ]
    rows = [(label, f"{value:.4g}") for label, value in [*scores, *known] if value is not None]
    if not rows:
        return ""
    lines = ["## Results", "", *_table("After the last step", "", rows)]
    files = facts.get("files") or ()
    if "curves.png" in files:
        lines += ["", "![Curves of the run](curves.png)"]
    if "metrics.jsonl" in files:
        lines += ["", "Every step is in [metrics.jsonl](metrics.jsonl)."]
    return "\n".join(lines)


def _use(adapter: str, base: str, rank: int, linked: bool) -> str:
    where = base if linked else f"PATH/TO/{base}"
    bound = next((one for one in _VLLM_RANKS if one >= rank), rank)
    name = _last_part(adapter)
    return "\n".join(
        [
            "## Use",
            "",
            "With PEFT:",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{where}")',
            f'base = AutoModelForCausalLM.from_pretrained("{where}")',
            f'model = PeftModel.from_pretrained(base, "{adapter}")',
            "```",
            "",
            f"Served by vLLM, as the model `{name}`:",
            "",
            "```shell",
            f"vllm serve {where} --enable-lora --max-lora-rank {bound} \\",
            f"  --lora-modules {name}={adapter}",
            "```",
        ]
    )


def _checkpoints(steps: Sequence[int], repo_id: str | None) -> str:
    if not steps or repo_id is None:
        return ""
    listed = ", ".join(f"{step:,}" for step in steps)
    return "\n".join(
        [
            "## Checkpoints",
            "",
            f"The adapter after step {listed}, each in a folder of its own. PEFT loads one with "
            f'`subfolder="checkpoints/step-{steps[-1]:06d}"`.',
        ]
    )


def _recipe(job: JobConfig, options: OnPolicyOptions, base: str) -> str:
    """Everything that the run was told, but for keys and addresses."""
    hidden = ("api_key", "api_key_env", "base_url")
    told = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in (*hidden, "teacher", "wandb_project", "wandb_name", "tracker")
    }
    told["student_checkpoint_path"] = (
        options.student_checkpoint_path or job.model.student_checkpoint_path
    )
    teachers = [
        {
            **{k: v for k, v in dataclasses.asdict(one).items() if k not in hidden and v},
            "name": _shown(one),
        }
        for one in options.teacher
    ]
    source = job.source
    functions = (("pre_processor", job.pre_processor), ("evaluator", job.evaluator))
    recipe = {
        "student": {
            "provider": job.model.provider,
            "name": base,
            "parameters": dict(job.model.parameters),
        },
        "teacher": teachers,
        **told,
        "generation": {
            "parameters": dict(job.generation.parameters),
            "seed": job.generation.seed,
            "system_prompt": job.generation.system_prompt,
        },
        "source": {
            "dataset": source.dataset if _on_hub(job) else _last_part(source.dataset),
            "config_name": source.config_name,
            "split": source.split,
            "revision": source.revision,
            "field": source.field,
            "max_examples": source.max_examples,
            "shuffle": source.shuffle,
        },
        **{name: function.name for name, function in functions if function is not None},
    }
    text = json.dumps(recipe, indent=2, ensure_ascii=False, default=str)
    # A fence longer than any in the text, since a system prompt may hold one.
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return "\n".join(["## Recipe", "", f"{fence}json", text, fence])


def _table(left: str, right: str, rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield f"| {left} | {right} |"
    yield "|---|---|"
    for label, text in rows:
        yield f"| {label} | {text.replace('|', chr(92) + '|')} |"
