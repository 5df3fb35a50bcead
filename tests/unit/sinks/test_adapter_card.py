"""The model card of an adapter: valid for the Hub, true to the job, and kept where it is edited."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from spider_sdk.config.model import (
    HubConfig,
    InputFile,
    JobConfig,
    OutputConfig,
    SourceConfig,
    TeacherConfig,
)
from spider_sdk.errors import FatalJobError
from spider_worker.sinks.adapter_card import adapter_card, keep_card
from tests.support.trackers import on_policy_job

HUB = OutputConfig("upload_hf", hf=HubConfig("me/sums", repo_type="model"))
FINAL = {
    "id": "step-000120",
    "step": 120,
    "kl": 0.25,
    "loss_per_token": -0.5,
    "eval/kl": 0.123456,
    "eval/kl/org/teacher": 0.123456,
    "eval/coverage": 1.0,
    "eval/score": 0.91,
    "stop_kl": None,
}
FACTS = {
    "steps": 120,
    "tokens": 1_234_567,
    "ended": "data",
    "checkpoints": [50, 100, 120],
    "files": ["adapter_config.json", "metrics.jsonl", "curves.png"],
    "final": FINAL,
}


def card(job: JobConfig | None = None, **facts: Any) -> str:
    return adapter_card(job or on_policy_job(HUB, lora_rank=24), {**FACTS, **facts})


def front(text: str) -> dict[str, Any]:
    parsed = ModelCard(text).data.to_dict()
    assert isinstance(parsed, dict)
    return parsed


def test_the_front_matter_is_what_the_hub_reads() -> None:
    found = front(card())
    assert found["base_model"] == "org/student"
    assert found["base_model_relation"] == "adapter"
    assert found["library_name"] == "peft"
    assert found["pipeline_tag"] == "text-generation"
    assert found["datasets"] == ["org/questions"]
    assert {"lora", "on-policy-distillation"} <= set(found["tags"])
    assert found["spider"]["teachers"] == ["org/teacher"]
    assert "license" not in found


def test_a_local_base_model_is_no_name_of_the_hub() -> None:
    """Nor is a folder of the worker's anybody's business."""
    text = card(base_model="/srv/models/student")
    assert "base_model" not in front(text)
    assert "/srv/models" not in text
    assert "`student`, a local model" in text
    # A name that could be one of the Hub's, but is found under one of the worker's folders.
    assert "base_model" in front(card(base_model="org/student"))


def test_uploaded_data_is_no_data_set_of_the_hub() -> None:
    job = on_policy_job(HUB)
    source = SourceConfig("org/questions", inputs=(InputFile("questions.jsonl", "0" * 64),))
    text = card(JobConfig(**{**vars(job), "source": source}))
    assert "datasets" not in front(text)
    local = SourceConfig("/home/ada/questions.jsonl")
    text = card(JobConfig(**{**vars(job), "source": local}))
    assert "datasets" not in front(text)
    assert "/home/ada" not in text
    assert "`questions.jsonl`" in text


def test_the_text_tells_teacher_data_figures_and_use() -> None:
    text = card()
    assert text.count("# sums\n") == 1
    for said in (
        "| Teacher | `org/teacher` |",
        "| Steps | 120 |",
        "| Sampled tokens | 1,234,567 |",
        "| Ended by | the end of the data |",
        "| Held-out score, by the evaluator | 0.91 |",
        "| Held-out reverse KL, nats a token | 0.1235 |",
        "![Curves of the run](curves.png)",
        'PeftModel.from_pretrained(base, "me/sums")',
        "vllm serve org/student --enable-lora --max-lora-rank 32",
        "--lora-modules sums=me/sums",
        'subfolder="checkpoints/step-000120"',
    ):
        assert said in text, said
    assert "stop token" not in text  # null at the end


def test_what_the_student_learnt_from_is_told() -> None:
    assert "learnt from the reverse KL on its own tokens." in card()
    assert "learnt from the reverse KL" in card(signals={"org/teacher": "sampled"})
    text = card(signals={"org/teacher": "full"})
    assert "learnt from the Jensen–Shannon divergence" in text
    assert "| Teacher | `org/teacher`, signal full |" in text
    assert "cross-entropy with the teacher's" in card(signals={"org/teacher": "topk"})


def test_the_code_of_the_card_is_code() -> None:
    blocks = re.findall(r"```python\n(.*?)```", card(), re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "card", "exec")


def test_several_teachers_with_weights_and_rules() -> None:
    teachers = (
        TeacherConfig("org/big", weight=0.7),
        TeacherConfig("/srv/models/coder", when={"kind": ["code", "a|b"]}, api_key_env="K"),
    )
    text = card(on_policy_job(HUB, teacher=teachers))
    row = next(line for line in text.splitlines() if line.startswith("| Teachers"))
    assert "`org/big`, weight 0.7<br>`coder`, for rows with" in row
    assert len(re.findall(r"(?<!\\)\|", row)) == 3  # what was typed makes no new column
    assert "/srv/models" not in text


def test_the_recipe_has_every_option_and_no_key() -> None:
    teacher = TeacherConfig("org/t", base_url="http://10.0.0.1/v1", api_key_env="SECRET_NAME")
    job = on_policy_job(
        HUB, teacher=(teacher,), learning_rate=3e-4, loss_fn="ppo", api_key_env="OTHER_NAME"
    )
    text = card(job)
    block = re.search(r"```json\n(.*?)\n```", text, re.DOTALL)
    assert block is not None
    recipe = yaml.safe_load(block[1])
    assert recipe["learning_rate"] == 3e-4
    assert recipe["loss_fn"] == "ppo"
    for name in ("groups_per_batch", "group_size", "max_tokens", "lora_rank", "num_substeps",
                 "kl_penalty_coef", "kl_discount_factor", "token_budget", "epochs", "seed",
                 "student_checkpoint_path"):  # fmt: skip
        assert name in recipe, name
    for hidden in ("SECRET_NAME", "OTHER_NAME", "10.0.0.1"):
        assert hidden not in text


def test_an_adapter_that_is_returned() -> None:
    text = card(on_policy_job(), files=[], checkpoints=[])
    assert front(text)["base_model"] == "org/student"
    assert "# student, distilled" in text
    assert "PATH/TO/adapter" in text
    assert "curves.png" not in text
    assert "## Checkpoints" not in text


def test_a_run_without_a_step() -> None:
    text = adapter_card(on_policy_job(HUB), {"steps": 0, "final": {}})
    assert "## Results" not in text
    assert front(text)["library_name"] == "peft"


# A card that stands there already -------------------------------------------------------


def test_a_new_repository_and_its_own_result_change_nothing() -> None:
    text = card()
    assert keep_card(None, text) == text
    assert keep_card("", text) == text
    assert keep_card(text, text) == text


def test_what_a_user_wrote_stays() -> None:
    edited = card().replace("library_name", "license: apache-2.0\nlibrary_name", 1)
    edited = edited.replace("# sums\n", "# Sums for everybody\n\nRead me first.\n", 1)
    edited = edited.replace("- lora\n", "- lora\n- arithmetic\n", 1) + "\n## Thanks\n"
    after = keep_card(edited, card(steps=240, final={**FINAL, "eval/score": 0.97}))
    found = front(after)
    assert found["license"] == "apache-2.0"
    assert "arithmetic" in found["tags"]
    assert "Read me first." in after
    assert "## Thanks" in after
    assert "| Steps | 240 |" in after
    assert "| Steps | 120 |" not in after
    assert "0.97" in after
    assert after.count("## Recipe") == 1


def test_a_card_without_ours_gets_it_at_the_end() -> None:
    after = keep_card("---\nlanguage: no\n---\n# Mine\n", card())
    assert "language: no\n" in after  # letter for letter: it is Norwegian
    assert after.index("# Mine") < after.index("## Recipe")


def test_another_base_model_takes_the_place_of_the_first() -> None:
    after = keep_card(card(), card(base_model="/srv/models/student"))
    assert "base_model" not in front(after)
    assert "base_model_relation" not in front(after)


def test_a_front_matter_that_cannot_be_read_is_not_thrown_away() -> None:
    with pytest.raises(FatalJobError, match=r"output model.*cannot be read"):
        keep_card("---\n- a list\n---\n", card())
