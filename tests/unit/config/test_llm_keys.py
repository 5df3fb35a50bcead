"""Which variables a SWE job's client forwards for its model's key."""

from __future__ import annotations

from typing import Any

import pytest

from spider_sdk.config import optional_secrets, parse_job


def forwarded(**swe: Any) -> set[str]:
    return set(optional_secrets(parse_job({"swe": swe}))) - {"HF_TOKEN"}


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("gpt-4o", {"OPENAI_API_KEY"}),
        ("openai/gpt-4o", {"OPENAI_API_KEY"}),
        ("claude-sonnet-4-5", {"ANTHROPIC_API_KEY"}),
        ("deepseek/deepseek-chat", {"DEEPSEEK_API_KEY"}),
        ("openrouter/anthropic/claude-sonnet-4.5", {"OPENROUTER_API_KEY"}),
        ("together_ai/a/b", {"TOGETHER_API_KEY", "TOGETHERAI_API_KEY"}),
        ("ollama/llama3", set()),
        ("oci/x", set()),
        ("my-own", set()),
    ],
)
def test_only_the_providers_own_key_leaves_the_client(model: str, names: set[str]) -> None:
    assert forwarded(llm_model=model) == names


@pytest.mark.parametrize(
    ("address", "names"),
    [
        ("https://api.openai.com/v1", {"OPENAI_API_KEY"}),
        ("https://openrouter.ai/api/v1", {"OPENROUTER_API_KEY"}),
        ("https://models.example/v1", set()),
    ],
)
def test_at_an_address_it_is_the_services_there(address: str, names: set[str]) -> None:
    assert forwarded(llm_model="openai/gpt-4o", llm_base_url=address) == names


def test_a_key_that_is_named_needs_no_other() -> None:
    assert forwarded(llm_model="gpt-4o", llm_api_key_env="MY_KEY") == set()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"AZURE_API_KEY", "AZURE_API_BASE", "AZURE_API_VERSION"}),
        ({"llm_api_key_env": "MY_KEY"}, {"AZURE_API_BASE", "AZURE_API_VERSION"}),
        # OpenAI's protocol is spoken there, with a key that is named for it.
        ({"llm_base_url": "https://models.example/v1"}, set()),
    ],
)
def test_of_a_providers_variables_those_leave_the_client_that_are_used(
    options: dict[str, str], names: set[str]
) -> None:
    assert forwarded(llm_model="azure/mine", **options) == names
