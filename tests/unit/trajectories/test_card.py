"""The card says how trajectories were made, without inventing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from spider_sdk.errors import FatalJobError
from spider_worker.trajectories.card import Tally, recipe, render_card
from spider_worker.trajectories.metadata import run_metadata
from spider_worker.trajectories.output_file import append, read_index
from tests.support.trajectories import CONFIG, record

METADATA = run_metadata(CONFIG)
TALLY = Tally({"timeout": 1, "finished": 3}, resolved=1, judged=2, attempts=6, cost=3.5, unpriced=0)


def render(existing: str | None = None, tally: Tally = TALLY, **more: Any) -> str:
    values: dict[str, Any] = {
        "repo_id": "me/out",
        "config": "default",
        "rows": 4,
        "push_filter": "all",
        "messages_format": "text",
        "redacted": {},
        **more,
    }
    return render_card(existing, values.pop("metadata", METADATA), tally, **values)


def front_of(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_a_new_card() -> None:
    card = render(redacted={"api-key": 2})
    front = front_of(card)
    files = [{"split": "train", "path": "data/default/train-*.parquet"}]
    assert front["configs"] == [{"config_name": "default", "data_files": files}]
    assert front["size_categories"] == ["n<1K"]
    assert front["source_datasets"] == ["SWE-bench/SWE-smith"]
    assert front["spider"]["default"]["rows"] == 4
    assert "agent" in front["tags"]
    for text in (
        "# out\n",
        "| Model | `openai/gpt-4o` |",
        "[SWE-bench/SWE-smith](https://huggingface.co/datasets/SWE-bench/SWE-smith)",
        "| Rows here | 4: every run, however it ended |",
        "| Runs | 4: 3 `finished`, 1 `timeout` |",
        "| Resolved | 1 of 2 judged (50.0 %); 2 not judged |",
        "| Attempts | 6 |",
        "| Cost of all attempts | $3.50 |",
        "2 `api-key`",
        '"max_iterations": 30',
        '"instance_filter": "pylint.*"',
    ):
        assert text in card, text
    assert "licen" not in card.lower()
    for secret in (CONFIG.llm_api_key, CONFIG.llm_base_url):
        assert secret is not None
        assert secret not in card
    assert METADATA["start_time"] not in card


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"cost": None, "unpriced": 6}, "| Cost of all attempts | unknown |"),
        ({"unpriced": 2}, "$3.50, and 2 attempts of unknown cost"),
        ({"judged": 0, "resolved": 0}, "| Resolved | not judged |"),
        ({"judged": 4, "resolved": 0}, "| Resolved | 0 of 4 judged (0.0 %) |"),
        ({"statuses": {"odd": 1}}, "| Runs | 1: 1 `odd` |"),
    ],
)
def test_what_is_unknown_is_not_made_up(changes: dict[str, Any], text: str) -> None:
    values = {name: getattr(TALLY, name) for name in Tally.__dataclass_fields__} | changes
    assert text in render(tally=Tally(**values))


def test_other_configurations_and_the_users_words_stay() -> None:
    existing = (
        "---\nlicense: mit  # mine\nconfigs:\n- config_name: other\n  data_files: o/*.json\n---\n"
        "# Mine\n\nMy words.\n"
    )
    card = render(render(existing), config="second", rows=2000)
    front = front_of(card)
    assert [one["config_name"] for one in front["configs"]] == ["other", "default", "second"]
    assert front["size_categories"] == ["1K<n<10K"]
    assert card.startswith("---\nlicense: mit  # mine\n")
    assert "# Mine\n\nMy words.\n" in card
    assert "## How `default` was made" in card
    assert "## How `second` was made" in card
    assert render(card, config="second", rows=2000) == card


def test_a_local_data_set_is_named_without_its_folder_and_linked_nowhere() -> None:
    metadata = {**METADATA, "dataset": "/home/somebody/tasks.jsonl"}
    card = render(metadata=metadata)
    assert "| Tasks | `tasks.jsonl` |" in card
    assert "somebody" not in card
    assert "source_datasets" not in front_of(card)


def test_a_name_cannot_break_the_table_and_missing_facts_are_unknown() -> None:
    card = render(metadata={"dataset": "a | b\n# c"})
    assert "| Tasks | `a \\| b # c` |" in card
    assert "| Model | unknown |" in card
    assert recipe({})["model"] is None


def test_a_front_matter_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(FatalJobError, match="front matter that cannot be read"):
        render("---\n- a\n---\n")


def test_a_tally_counts_runs_once_and_all_attempts_costs(tmp_path: Path) -> None:
    output = tmp_path / "output.jsonl"
    append(output, record("a", status="timeout", cost=1.0))
    append(output, record("a", attempt=2, cost=0.5, resolved=True))
    append(output, record("b", status="stuck", cost=None))
    tally = Tally.of(read_index(output))
    assert tally == Tally({"finished": 1, "stuck": 1}, 1, 1, 3, 1.5, 1)
    assert tally.runs == 2
