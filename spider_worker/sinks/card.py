"""The dataset card (README.md) of a published data set.

A card belongs to its user. Ours are: one section between two marks for each configuration
we publish, and in the YAML front matter the ``configs`` entry (and a stale ``dataset_info``)
of that configuration, ``size_categories``, our ``tags`` beside others, and ``spider``, which
holds the recipe for programs. All else stays as it is found. No licence is ever written: what
may be done with generated text depends on the teacher's terms and on the source data.
"""

from __future__ import annotations

__all__ = ["CardFacts", "check_card", "data_folder", "render_card"]

import dataclasses
import importlib.metadata
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, Self

import yaml

from spider_sdk.config.model import JobConfig
from spider_sdk.errors import FatalJobError

TAGS: Final = ("synthetic", "distillation", "spider")

_FRONT: Final = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.M)
_TOP_LEVEL: Final = re.compile(r"""^([\w-]+|"[^"\n]+"|'[^'\n]+')[ \t]*:(?=\s)""", re.M)
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
    def from_job(cls, job: JobConfig, *, revision: str | None = None) -> Self:
        """The facts of an off-policy job. ``revision`` is the commit of the source that was
        read, where it is known; otherwise what the job asked for."""
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
                "revision": revision or source.revision,
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
    _split(text or "")


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
    front, body = _split(existing or "")
    if not body.strip():
        body = f"# {repo_id.split('/')[-1]}\n"
    ours = _own_front_matter(front, facts, config=config, split=split, rows=rows)
    section = _section(facts, config, rows, counts, json_columns)
    return f"---\n{_edit(front, ours)}---\n{_with_section(body, config, section)}"


def _split(text: str) -> tuple[str, str]:
    """The front matter's YAML ("" for none) and what follows it."""
    found = _FRONT.match(text)
    if found is None:
        return "", text
    try:
        front = yaml.safe_load(found[1])
        why = "it is not a mapping"
    except yaml.YAMLError as error:
        front, why = error, str(error)
    if not isinstance(front, dict | None):
        raise FatalJobError(
            "The README.md of the output dataset has a front matter that cannot be read, so it "
            f"cannot be kept: {why}. Repair it on the Hub, then submit or retry the job"
        )
    return found[1], text[found.end() :]


def _edit(front: str, ours: Mapping[str, Any]) -> str:
    """``front`` with the top-level keys of ``ours`` set, or removed where None.

    The text of all other keys is kept letter for letter: PyYAML would read ``no`` (Norwegian)
    as False, which the Hub does not, and it would drop comments.
    """
    text = {key: _dump({key: value}) for key, value in ours.items() if value is not None}
    starts = [*_TOP_LEVEL.finditer(front)]
    parts = [front[: starts[0].start()] if starts else front]
    for start, following in itertools.zip_longest(starts, starts[1:]):
        key = start[1].strip("'\"")
        block = front[start.start() : following.start() if following else None]
        parts.append(text.pop(key, "") if key in ours else block)
    edited = "".join(parts)
    if edited and not edited.endswith("\n"):
        edited += "\n"
    edited += "".join(text.values())
    wanted = {**(yaml.safe_load(front) or {}), **ours}
    wanted = {key: value for key, value in wanted.items() if value is not None}
    try:
        same = yaml.safe_load(edited) == wanted
    except yaml.YAMLError:
        same = False
    # Written in a way that cannot be cut at its keys ({a: b, …}): say the same in another.
    return edited if same else _dump(wanted)


def _dump(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=100)


def _own_front_matter(
    text: str, facts: CardFacts, *, config: str, split: str, rows: int
) -> dict[str, Any]:
    """The new values of the keys that are ours; None removes one."""
    front = yaml.safe_load(text) or {}
    configs = [c for c in _entries(front, "configs") if c.get("config_name", "default") != config]
    if rows:
        files = [{"split": split, "path": f"{data_folder(config)}/{split}-*.parquet"}]
        configs.append({"config_name": config, "data_files": files})
    # What push_to_hub once noted of this configuration (types, numbers of rows) describes
    # files that are replaced, and load_dataset would hold the new ones against it.
    infos = _entries(front, "dataset_info")
    infos = [info for info in infos if info.get("config_name", "default") != config]
    made = front.get("spider")
    made = dict(made) if isinstance(made, dict) else {}
    made[config] = {
        "version": facts.version,
        "teacher": facts.teacher,
        "source": facts.dataset,
        "rows": rows,
    }
    total = sum(int(one.get("rows") or 0) for one in made.values() if isinstance(one, dict))
    ours = {
        "configs": configs or None,
        "dataset_info": infos or None,
        "tags": _with_names(text, "tags", TAGS),
        "size_categories": [_size_category(total)],
        "spider": made,
    }
    if facts.hub_dataset:
        ours["source_datasets"] = _with_names(text, "source_datasets", [facts.dataset])
    return ours


def _with_names(text: str, key: str, names: Iterable[str]) -> list[str]:
    """A list of strings with ``names`` added; read as text alone, for ``no`` is one too."""
    front = yaml.load(text, Loader=yaml.BaseLoader) or {}  # noqa: S506 (builds only strings)
    present = front.get(key) or []
    present = [present] if isinstance(present, str) else list(present)
    return present + [name for name in names if name not in present]


def _entries(front: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """``configs`` and ``dataset_info`` may be one mapping or a list of them."""
    value = front.get(key)
    items = value if isinstance(value, list) else [value]
    return [dict(item) for item in items if isinstance(item, dict)]


def _size_category(rows: int) -> str:
    return next((name for limit, name in _SIZES if rows < limit), "n>1T")


def _with_section(body: str, config: str, section: str) -> str:
    begin, end = f"<!-- spider:begin {config} -->", f"<!-- spider:end {config} -->"
    block = f"{begin}\n{section}{end}"
    start, stop = body.find(begin), body.find(end)
    if 0 <= start < stop:
        return body[:start] + block + body[stop + len(end) :]
    return f"{body.rstrip()}\n\n{block}\n"


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
