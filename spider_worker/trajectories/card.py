"""The section that a data set of trajectories has on its card.

As on every card of ours (``spider_worker.sinks.card``), what its user wrote and what other
configurations say of themselves stays, and no licence is named: what may be done with trajectories
depends on the model's terms and on the licences of the repositories that they quote.
"""

from __future__ import annotations

__all__ = ["Tally", "check_card", "recipe", "render_card"]

import collections
import dataclasses
import importlib.metadata
import json
import re
from collections.abc import Mapping
from typing import Any, Final

from spider_worker.sinks import front_matter
from spider_worker.sinks.card import check_card, config_front_matter
from spider_worker.trajectories.filters import FILTERS
from spider_worker.trajectories.layout import is_local, shown_name
from spider_worker.trajectories.output_file import Index
from spider_worker.trajectories.record import STATUSES
from spider_worker.trajectories.rows import JSON_COLUMNS

TAGS: Final = ("spider", "openhands", "swe", "agent", "trajectories", "synthetic")
SPLIT: Final = "train"

_HUB_ID: Final = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FORMATS: Final = {
    "openai": "as the model saw them, with tool calls (`openai`)",
    "text": "plain role and content, tool calls and results as text (`text`)",
}


@dataclasses.dataclass(frozen=True)
class Tally:
    """What became of a run's instances, those included that the data set leaves out.

    ``cost`` is in US dollars over all attempts, None where no attempt's is known; ``unpriced`` is
    the number of attempts whose cost is unknown.
    """

    statuses: Mapping[str, int]
    resolved: int
    judged: int
    attempts: int
    cost: float | None
    unpriced: int

    @classmethod
    def of(cls, index: Index) -> Tally:
        entries = index.latest.values()
        verdicts = [entry.resolved for entry in entries if entry.resolved is not None]
        cost, unpriced = index.cost()
        return cls(
            statuses=collections.Counter(entry.status for entry in entries),
            resolved=sum(verdicts),
            judged=len(verdicts),
            attempts=sum(map(len, index.attempts.values())),
            cost=cost,
            unpriced=unpriced,
        )

    @property
    def runs(self) -> int:
        return sum(self.statuses.values())


def recipe(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader needs to repeat a run: no folder, no address, no time."""
    llm = metadata.get("llm_config")
    llm = llm if isinstance(llm, Mapping) else {}
    details = metadata.get("details")
    return {
        "dataset": _shown(metadata.get("dataset")),
        "split": metadata.get("data_split"),
        "model": _shown(llm.get("model")),
        "temperature": llm.get("temperature"),
        "agent_class": metadata.get("agent_class"),
        "agent_config": metadata.get("agent_config"),
        "max_iterations": metadata.get("max_iterations"),
        "condenser": metadata.get("condenser_config"),
        **(details if isinstance(details, Mapping) else {}),
    }


def render_card(
    existing: str | None,
    metadata: Mapping[str, Any],
    tally: Tally,
    *,
    repo_id: str,
    config: str,
    rows: int,
    left_out: int = 0,
    push_filter: str,
    messages_format: str,
    redacted: Mapping[str, int],
) -> str:
    """The README's new text. ``existing`` None: there is none yet. ``left_out`` is the number of
    runs without a turn of the agent, ``redacted`` counts secrets by kind. Rendering its own result
    again changes nothing. Raises FatalJobError for a front matter that could not be kept."""
    front, body = front_matter.split(existing or "", "dataset")
    if not body.strip():
        body = f"# {repo_id.split('/')[-1]}\n"
    made = recipe(metadata)
    dataset = str(metadata.get("dataset") or "")
    ours = config_front_matter(
        front,
        config=config,
        split=SPLIT,
        rows=rows,
        about={
            "version": _version(made),
            "model": made["model"],
            "source": made["dataset"],
            "agent_class": made["agent_class"],
            "messages_format": messages_format,
            "push_filter": push_filter,
        },
        tags=TAGS,
        source=dataset if _on_hub(dataset) else None,
    )
    chosen = FILTERS[push_filter]
    if left_out:
        chosen += f", but for {left_out:,} without a turn of the agent"
    facts = _facts(made, dataset, tally, f"{rows:,}: {chosen}", messages_format, redacted)
    text = json.dumps(made, indent=2, ensure_ascii=False, default=str)
    # A fence longer than any in the text, since a prompt may hold one.
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    section = "\n".join(
        [
            f"## How `{config}` was made",
            "",
            f"Trajectories of a coding agent, generated with Spider {_version(made)}. They are a "
            "model's work, not a person's, and quote the repositories worked on.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {label} | {_cell(value)} |" for label, value in facts),
            "",
            "Recipe:",
            "",
            f"{fence}json",
            text,
            fence,
            "",
            "`train` has a boolean for each of `messages`: whether it is the agent's, and without "
            "a call that came to nothing (no JSON, no such tool, no such arguments). Trainers do "
            "not know this column (TRL's `SFTTrainer` passes over it): drop rows, or mask "
            "messages, by it.",
            "",
            f"JSON text: {', '.join(f'`{name}`' for name in JSON_COLUMNS)}.",
            "",
        ]
    )
    edited = front_matter.edit(front, ours)
    return f"---\n{edited}---\n{front_matter.with_section(body, config, section)}"


def _facts(
    made: Mapping[str, Any],
    dataset: str,
    tally: Tally,
    rows: str,
    messages_format: str,
    redacted: Mapping[str, int],
) -> list[tuple[str, str]]:
    linked = f"[{dataset}](https://huggingface.co/datasets/{dataset})"
    known = [status for status in STATUSES if tally.statuses.get(status)]
    others = sorted(set(tally.statuses) - set(STATUSES))
    ends = ", ".join(f"{tally.statuses[status]:,} `{status}`" for status in [*known, *others])
    facts = [
        ("Model", _quoted(made["model"])),
        ("Tasks", linked if _on_hub(dataset) else _quoted(made["dataset"])),
        ("Split", _quoted(made["split"])),
        ("Agent", _quoted(made["agent_class"])),
        ("Iterations", f"at most {_quoted(made['max_iterations'])}"),
        ("Messages", _FORMATS[messages_format]),
        ("Rows here", rows),
        ("Runs", f"{tally.runs:,}: {ends}"),
        ("Resolved", _resolved(tally)),
        ("Attempts", f"{tally.attempts:,}"),
        ("Cost of all attempts", _cost(tally)),
    ]
    if redacted:
        kinds = ", ".join(f"{count:,} `{kind}`" for kind, count in sorted(redacted.items()))
        facts.append(("Secrets taken out", f"{kinds}; each is `[REDACTED:…]` in the text"))
    return facts


def _quoted(value: Any) -> str:
    return "unknown" if value is None else f"`{value}`"


def _cell(text: str) -> str:
    """A name may hold what would end the cell or the row."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def _resolved(tally: Tally) -> str:
    if not tally.judged:
        return "not judged"
    share = 100 * tally.resolved / tally.judged
    rest = tally.runs - tally.judged
    more = f"; {rest:,} not judged" if rest else ""
    return f"{tally.resolved:,} of {tally.judged:,} judged ({share:.1f} %){more}"


def _cost(tally: Tally) -> str:
    if tally.cost is None:
        return "unknown"
    known = f"${tally.cost:,.2f}"
    return f"{known}, and {tally.unpriced:,} attempts of unknown cost" if tally.unpriced else known


def _on_hub(dataset: str) -> bool:
    return not is_local(dataset) and _HUB_ID.fullmatch(dataset) is not None


def _shown(name: Any) -> str | None:
    return None if name is None else shown_name(str(name))


def _version(made: Mapping[str, Any]) -> str:
    """Of the Spider that made the trajectories; where that is not known, of this one."""
    return str(made.get("spider") or importlib.metadata.version("spider-distill"))
