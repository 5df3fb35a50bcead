"""The dataset card says how the data was made and keeps whatever its user wrote."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml

from spider_sdk.config.model import (
    GenerationConfig,
    InputFile,
    JobConfig,
    ModelConfig,
    ProcessorConfig,
    SourceConfig,
)
from spider_sdk.errors import FatalJobError
from spider_worker.sinks.card import CardFacts, check_card, render_card

JOB = JobConfig(
    model=ModelConfig(provider="vllm", name="org/teacher", api_key="sk-secret", api_key_env="KEY"),
    source=SourceConfig(dataset="org/questions", split="train[0:10]", revision="abc123"),
    generation=GenerationConfig(parameters={"temperature": 0.7}, system_prompt="a ``` fence"),
    pre_processor=ProcessorConfig("ask", "def ask(row): return 'secret source'"),
)
FACTS = CardFacts.from_job(JOB)


def render(existing: str | None, rows: int = 10, config: str = "default", **more: Any) -> str:
    counts = more.pop("counts", {"rows_ok": rows, "rows_error": 3, "cost_usd": None})
    return render_card(
        existing, FACTS, repo_id="me/out", config=config, split="train", rows=rows, counts=counts
    )


def front_of(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_a_new_card_has_the_recipe_and_the_counts_and_no_licence() -> None:
    card = render(None)
    front = front_of(card)
    files = [{"split": "train", "path": "data/default/train-*.parquet"}]
    assert front["configs"] == [{"config_name": "default", "data_files": files}]
    assert front["size_categories"] == ["n<1K"]
    assert front["source_datasets"] == ["org/questions"]
    assert "license" not in card.lower()
    for part in ("# out", "org/teacher", "abc123", "train[0:10]", '"temperature": 0.7', "| 3 |"):
        assert part in card
    assert "Cost" not in card  # unknown, not zero
    assert "secret" not in card
    assert "````json" in card  # the system prompt's own fence does not end the block


def test_rendering_again_changes_nothing() -> None:
    card = render(None)
    assert render(card) == card
    assert render(render("my text"), rows=20) == render(render("my text", rows=20), rows=20)


def test_what_the_user_wrote_stays_letter_for_letter() -> None:
    existing = (
        "---\n# a comment\nlicense: mit\nlanguage:\n- no  # Norwegian\ntags: mine\n"
        "pretty_name: 'It''s mine'\nconfigs:\n- config_name: other\n  data_files: other/*.json\n"
        "  default: true\n---\n# My title\n\nMy words.\n"
    )
    card = render(existing)
    assert card.startswith("---\n# a comment\nlicense: mit\nlanguage:\n- no  # Norwegian\ntags:\n")
    assert "pretty_name: 'It''s mine'\n" in card
    assert "\n# My title\n\nMy words.\n" in card
    front = front_of(card)
    assert front["tags"] == ["mine", "synthetic", "distillation", "spider"]
    assert [c["config_name"] for c in front["configs"]] == ["other", "default"]
    assert front["configs"][0]["default"] is True
    later = card + "\nAn afterword.\n"
    assert render(later, rows=2000).endswith("\nAn afterword.\n")
    assert "2,000" in render(later, rows=2000)


def test_a_front_matter_in_flow_style_is_kept_by_meaning() -> None:
    front = front_of(render("---\n{license: mit, tags: [x]}\n---\nhello\n"))
    assert front["license"] == "mit"
    assert front["tags"][0] == "x"


def test_configurations_share_a_card() -> None:
    card = render(render(None, rows=900), rows=300, config="hard")
    assert [c["config_name"] for c in front_of(card)["configs"]] == ["default", "hard"]
    assert front_of(card)["size_categories"] == ["1K<n<10K"]
    assert card.count("spider:begin") == 2
    # Without rows there are no files, and an entry for none would break loading.
    assert [c["config_name"] for c in front_of(render(card, rows=0))["configs"]] == ["hard"]


def test_what_was_noted_of_replaced_files_goes() -> None:
    infos = [{"config_name": "default", "features": []}, {"config_name": "other", "features": []}]
    existing = f"---\n{yaml.safe_dump({'dataset_info': infos})}---\n"
    assert front_of(render(existing))["dataset_info"] == infos[1:]


def test_an_uploaded_file_is_no_source_dataset_on_the_hub() -> None:
    source = dataclasses.replace(JOB.source, dataset="a/b", inputs=(InputFile("b", "0" * 64),))
    facts = CardFacts.from_job(dataclasses.replace(JOB, source=source))
    assert not facts.hub_dataset


@pytest.mark.parametrize("front", ["a: [", "- just\n- a list"])
def test_a_broken_front_matter_is_not_overwritten(front: str) -> None:
    with pytest.raises(FatalJobError, match="front matter"):
        check_card(f"---\n{front}\n---\ntext\n")


def test_a_running_job_says_so() -> None:
    assert "goes on" in render(None, counts=None)
    assert "goes on" not in render(render(None, counts=None))


def test_configurations_keep_their_order() -> None:
    both = render(render(None, config="one"), config="two")
    assert render(both, config="one") == both
    assert [c["config_name"] for c in front_of(both)["configs"]] == ["one", "two"]
