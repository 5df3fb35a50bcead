"""Which variables hold what must not leave."""

from __future__ import annotations

from spider_worker.trajectories.known_secrets import known_secrets
from spider_worker.trajectories.metadata import run_metadata
from tests.support.trajectories import CONFIG

ENVIRON = {
    "FIREWORKS_API_KEY": "fw-1234-of-mine",
    "VLLM_API_KEY": "EMPTY",
    "GH_TOKEN": "disabled",
    "DB_PASSWORD": "correcthorsebatterystaple",
    "AWS_SECRET_ACCESS_KEY": "",
    "MODEL_KEY": "named-by-the-run",
    "MINE": "given",
    "HOME": "/home/somebody",
    "LC_ALL": "C.UTF-8-and-more",
}


def test_what_sounds_like_a_secret_and_is_no_word() -> None:
    found = ["correcthorsebatterystaple", "fw-1234-of-mine"]
    assert known_secrets(ENVIRON, None) == found
    assert known_secrets(ENVIRON, {"llm_config": None}) == found


def test_what_the_run_and_the_user_name_counts_whatever_it_is() -> None:
    metadata = run_metadata(CONFIG) | {"llm_config": {"api_key_env": "MODEL_KEY"}}
    found = known_secrets(ENVIRON, metadata, ["MINE", "AWS_SECRET_ACCESS_KEY", "UNSET"])
    assert found == ["correcthorsebatterystaple", "fw-1234-of-mine", "given", "named-by-the-run"]
