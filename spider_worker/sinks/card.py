"""The dataset card (README.md) of a published data set.

A card belongs to its user. Ours are: one section between two marks for each configuration
we publish, and in the YAML front matter the ``configs`` entry (and a stale ``dataset_info``)
of that configuration, ``size_categories``, our ``tags`` beside others, and ``spider``, which
holds the recipe for programs. All else stays as it is found. No licence is ever written: what
may be done with generated text depends on the teacher's terms and on the source data.
"""

from __future__ import annotations

__all__ = ["CardFacts", "check_card", "config_front_matter", "data_folder", "render_card"]

import dataclasses
import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, Self

import yaml

from spider_sdk.config.model import JobConfig
from spider_worker.sinks import front_matter

TAGS: Final = ("synthetic", "distillation", "spider")

_SIZES: Final = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
    (10_000_000_000, "1B<n<10B"),
    (100_000_000_000, "10B<n<100B"),
    (1_000_000_000_000, "100B<n<1T"),
)


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What the card tells of a job beside its counts. ``recipe`` is JSON without secrets.

    ``teacher`` is the model that generated. ``dataset`` is the source as the job named it;
    ``hub_dataset`` says that it is an id on the Hub and no uploaded file.
    """

    teacher: str
    provider: str
    dataset: str
    hub_dataset: bool
    recipe: Mapping[str, Any]
    version: str

    @classmethod
    def from_job(cls, job: JobConfig) -> Self:
        """The facts of an off-policy job; the revision of the source is the one that it names."""
        source, generation = job.source, job.generation
        functions = (("pre_processor", job.pre_processor), ("post_processor", job.post_processor))
        recipe = {
            "model": {
                "provider": job.model.provider,
                "name": job.model.name,
                "parameters": dict(job.model.parameters),
            },
            "source": {
                "dataset": source.dataset,
                "config_name": source.config_name,
                "split": source.split,
                "revision": source.revision,
                "field": source.field,
                "max_examples": source.max_examples,
                "shuffle": source.shuffle,
            },
            "generation": {
                "parameters": dict(generation.parameters),
                "duplications": generation.duplications,
                "seed": generation.seed,
                "system_prompt": generation.system_prompt,
            },
            **{name: function.name for name, function in functions if function is not None},
        }
        return cls(
            teacher=job.model.name,
            provider=job.model.provider,
            dataset=source.dataset,
            hub_dataset=not source.inputs
            and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", source.dataset)),
            recipe=recipe,
            version=importlib.metadata.version("spider-distill"),
        )


def data_folder(config: str) -> str:
    """Where the shards of a configuration lie in the repository."""
    return f"data/{config}"


def check_card(text: str | None) -> None:
    """Raise FatalJobError if that README's front matter could not be kept."""
    front_matter.split(text or "", "dataset")


def render_card(
    existing: str | None,
    facts: CardFacts,
    *,
    repo_id: str,
    config: str,
    split: str,
    rows: int,
    counts: Mapping[str, Any] | None,
    json_columns: tuple[str, ...] = (),
) -> str:
    """The README's new text. ``existing`` None: there is none yet.

    ``rows`` stand on the Hub; ``counts`` are the job's counters once it has ended, None
    while it runs. Rendering its own result again changes nothing.
    """
    front, body = front_matter.split(existing or "", "dataset")
    if not body.strip():
        body = f"# {repo_id.split('/')[-1]}\n"
    ours = config_front_matter(
        front,
        config=config,
        split=split,
        rows=rows,
        about={"version": facts.version, "teacher": facts.teacher, "source": facts.dataset},
        tags=TAGS,
        source=facts.dataset if facts.hub_dataset else None,
    )
    section = _section(facts, config, rows, counts, json_columns)
    edited = front_matter.edit(front, ours)
    return f"---\n{edited}---\n{front_matter.with_section(body, config, section)}"


def config_front_matter(
    text: str,
    *,
    config: str,
    split: str,
    rows: int,
    about: Mapping[str, Any],
    tags: Iterable[str],
    source: str | None,
) -> dict[str, Any]:
    """The new values of the keys that are ours, for ``front_matter.edit``; None removes one.

    ``text`` is the front matter as it stands: other configurations stay in it. ``about`` is what
    ``spider`` says of this one besides its ``rows``. ``source`` is the data set that it was made
    from, None where that is not on the Hub.
    """
    front = yaml.safe_load(text) or {}
    configs = _entries(front, "configs")
    names = [entry.get("config_name", "default") for entry in configs]
    # In its place, or jobs that share a repository would change the order in turn, for ever.
    place = names.index(config) if config in names else len(names)
    configs = [entry for entry, name in zip(configs, names, strict=True) if name != config]
    if rows:
        files = [{"split": split, "path": f"{data_folder(config)}/{split}-*.parquet"}]
        configs.insert(place, {"config_name": config, "data_files": files})
    # What push_to_hub once noted of this configuration (types, numbers of rows) describes
    # files that are replaced, and load_dataset would hold the new ones against it.
    infos = _entries(front, "dataset_info")
    infos = [info for info in infos if info.get("config_name", "default") != config]
    made = front.get("spider")
    made = dict(made) if isinstance(made, dict) else {}
    made[config] = {**about, "rows": rows}
    total = sum(int(one.get("rows") or 0) for one in made.values() if isinstance(one, dict))
    ours = {
        "configs": configs or None,
        "dataset_info": infos or None,
        "tags": front_matter.with_names(text, "tags", tags),
        "size_categories": [_size_category(total)],
        "spider": made,
    }
    if source is not None:
        ours["source_datasets"] = front_matter.with_names(text, "source_datasets", [source])
    return ours


def _entries(front: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """``configs`` and ``dataset_info`` may be one mapping or a list of them."""
    value = front.get(key)
    items = value if isinstance(value, list) else [value]
    return [dict(item) for item in items if isinstance(item, dict)]


def _size_category(rows: int) -> str:
    return next((name for limit, name in _SIZES if rows < limit), "n>1T")


def _section(
    facts: CardFacts,
    config: str,
    rows: int,
    counts: Mapping[str, Any] | None,
    json_columns: tuple[str, ...],
) -> str:
    source = facts.recipe["source"]
    link = f"[{facts.dataset}](https://huggingface.co/datasets/{facts.dataset})"
    lines = [
        f"## How `{config}` was made",
        "",
        f"Generated with Spider {facts.version}. The completions are a model's, not a person's, "
        "and were not checked by hand.",
        "",
        "| | |",
        "|---|---|",
        f"| Teacher | `{facts.teacher}` ({facts.provider}) |",
        f"| Source | {link if facts.hub_dataset else f'`{facts.dataset}`'} |",
        f"| Source split | `{source['split']}` |",
    ]
    if source["revision"]:
        lines.append(f"| Source revision | `{source['revision']}` |")
    lines.append(f"| Rows here | {rows:,} |")
    if counts is None:
        lines.append("| State | generation goes on; the counts are those so far |")
    else:
        lines += [f"| {label} | {text} |" for label, text in _counted(counts)]
    recipe = json.dumps(facts.recipe, indent=2, ensure_ascii=False, default=str)
    # A fence longer than any in the text, since a system prompt may hold one.
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", recipe)), 3)
    lines += ["", "Recipe:", "", f"{fence}json", recipe, fence, ""]
    if json_columns:
        names = ", ".join(f"`{name}`" for name in json_columns)
        lines += [f"Columns whose values share no type are JSON text: {names}.", ""]
    return "\n".join(lines)


def _counted(counts: Mapping[str, Any]) -> list[tuple[str, str]]:
    labels = (
        ("rows_ok", "Samples generated"),
        ("rows_error", "Samples that failed (left out)"),
        ("rows_dropped", "Samples dropped by a processor"),
        ("prompt_tokens", "Prompt tokens"),
        ("completion_tokens", "Completion tokens"),
    )
    lines = [(label, f"{int(counts[n]):,}") for n, label in labels if counts.get(n) is not None]
    if counts.get("cost_usd") is not None:
        lines.append(("Cost", f"${float(counts['cost_usd']):,.2f}"))
    return lines
