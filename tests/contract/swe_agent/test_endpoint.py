"""Who answers for a model's name, with whose key: LiteLLM of the agents' environment says."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spider_sdk.config.model import SweConfig
from spider_sdk.config.secrets import optional_secrets
from spider_sdk.errors import EngineUnavailable, FatalJobError, NotSupported
from spider_worker.agents.interpreter import QUIET
from spider_worker.pipelines.swe_agent import endpoint as module
from spider_worker.pipelines.swe_agent.endpoint import find_endpoint
from spider_worker.pipelines.swe_agent.parts import Endpoint
from spider_worker.settings import WorkerSettings

#: The value of each variable is its name.
KEYS = (
    "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "DEEPSEEK_API_KEY", "OPENROUTER_API_KEY",
    "TOGETHER_API_KEY", "GEMINI_API_KEY", "MISTRAL_API_KEY", "MY_KEY",
)  # fmt: skip


NAMES = (
    "gpt-4o", "deepseek/deepseek-chat", "mistral/mistral-large-latest", "together_ai/org/model",
    "openrouter/anthropic/claude-sonnet-4.5", "claude-sonnet-4-5", "gemini/gemini-2.5-pro",
    "ollama/llama3", "gemini-2.5-pro", "replicate/a/b", "hosted_vllm/org/m", "your-org/your-model",
    "accounts/fireworks/models/m", "openai/gpt-oss-20b", "anthropic/claude-sonnet-4.5",
    "azure/mine", "azure_ai/mine", "azure_ai/gpt-4o", "bedrock/anthropic.claude",
    "databricks/mine", "sagemaker_chat/mine", "snowflake/mine", "snowflake/claude-3-5-sonnet",
    "vertex_ai/gemini-2.5-pro", "watsonx/mine", "anthropic.claude-3-5-sonnet-20240620-v1:0",
    "azure/command-r-plus",
)  # fmt: skip
_ASK = """
import json, sys
from spider_agent.models import describe
print(json.dumps({name: describe(name) for name in sys.argv[1:]}))
"""


@pytest.fixture(scope="session")
def answers(python: str) -> Mapping[str, Any]:
    """What LiteLLM makes of all the names, asked once: it takes seconds to import."""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [python, "-c", _ASK, *NAMES],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), **QUIET},
        stdout=subprocess.PIPE,
        check=True,
    )
    answers: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.fixture(autouse=True)
def asked(answers: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(_python: str, name: str) -> Any:
        return answers[name]

    monkeypatch.setattr(module, "ask_model", ask)


def found(python: str, model: str, *, keys: tuple[str, ...] = KEYS, **swe: Any) -> Endpoint:
    job = SweConfig(llm_model=model, **swe)
    ctx: Any = SimpleNamespace(job=job, secrets={name: name for name in keys})
    settings = WorkerSettings(state=Path("unused"), agent_python=python)
    return asyncio.run(find_endpoint(settings, ctx))


@pytest.mark.parametrize(
    ("model", "key", "address"),
    [
        ("gpt-4o", "OPENAI_API_KEY", "https://api.openai.com/v1"),
        ("deepseek/deepseek-chat", "DEEPSEEK_API_KEY", "https://api.deepseek.com/beta"),
        ("mistral/mistral-large-latest", "MISTRAL_API_KEY", "https://api.mistral.ai/v1"),
        ("together_ai/org/model", "TOGETHER_API_KEY", "https://api.together.xyz/v1"),
        (
            "openrouter/anthropic/claude-sonnet-4.5",
            "OPENROUTER_API_KEY",
            "https://openrouter.ai/api/v1",
        ),
    ],
)
def test_who_speaks_openais_protocol_is_reached_by_the_proxy_with_its_own_key(
    python: str, model: str, key: str, address: str
) -> None:
    endpoint = found(python, model)
    assert (endpoint.model, endpoint.key, endpoint.base_url) == (model, key, address)
    assert endpoint.proxied


@pytest.mark.parametrize(
    ("model", "key"),
    [("claude-sonnet-4-5", "ANTHROPIC_API_KEY"), ("gemini/gemini-2.5-pro", "GEMINI_API_KEY")],
)
def test_another_protocol_has_its_own_key_in_the_agent(python: str, model: str, key: str) -> None:
    endpoint = found(python, model)
    assert (endpoint.key, endpoint.base_url, endpoint.proxied) == (key, None, False)


def test_ollama_wants_no_key_and_is_spoken_to_in_openais_protocol(python: str) -> None:
    endpoint = found(python, "ollama/llama3")
    assert endpoint.key is None
    assert (endpoint.model, endpoint.base_url) == ("openai/llama3", "http://localhost:11434/v1")
    assert endpoint.proxied


def test_a_key_that_is_named_goes_before_the_usual_one(python: str) -> None:
    assert found(python, "gpt-4o", llm_api_key_env="MY_KEY").key == "MY_KEY"


@pytest.mark.parametrize(
    ("model", "error", "said"),
    [
        ("chatgpt/gpt-5", NotSupported, "provider chatgpt.* llm_base_url"),
        ("oci/xai.grok-4", NotSupported, "provider oci"),
        ("replicate/a/b", FatalJobError, "provider replicate.* set llm_api_key_env"),
        ("hosted_vllm/org/m", FatalJobError, "knows the address .* llm_base_url"),
    ],
)
def test_what_one_key_does_not_open_is_said(
    python: str, model: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        found(python, model)


AZURE = ("AZURE_API_KEY", "AZURE_API_BASE")
AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
VERTEX = ("VERTEXAI_CREDENTIALS", "VERTEXAI_PROJECT", "VERTEXAI_LOCATION")


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("azure/mine", (*AZURE, "AZURE_API_VERSION")),
        ("azure_ai/mine", ("AZURE_AI_API_KEY", "AZURE_AI_API_BASE")),
        # A model of OpenAI's there, which LiteLLM leaves to its azure.
        ("azure_ai/gpt-4o", ("AZURE_AI_API_KEY", "AZURE_AI_API_BASE")),
        ("bedrock/anthropic.claude", AWS),
        ("bedrock/anthropic.claude", ("AWS_BEARER_TOKEN_BEDROCK", "AWS_REGION_NAME")),
        ("databricks/mine", ("DATABRICKS_API_KEY", "DATABRICKS_API_BASE")),
        ("sagemaker_chat/mine", AWS),
        ("snowflake/mine", ("SNOWFLAKE_JWT", "SNOWFLAKE_ACCOUNT_ID")),
        ("watsonx/mine", ("WATSONX_APIKEY", "WATSONX_URL", "WATSONX_PROJECT_ID")),
    ],
)
def test_providers_that_take_more_than_a_key_have_their_variables_in_the_agent(
    python: str, model: str, names: tuple[str, ...]
) -> None:
    endpoint = found(python, model, keys=(*KEYS, *names))
    assert endpoint.variables == {name: name for name in names}
    assert (endpoint.model, endpoint.key, endpoint.base_url) == (model, None, None)
    assert not endpoint.proxied
    assert not any(name in repr(endpoint) for name in names)
    # What may be needed is forwarded.
    assert {*names} <= {*optional_secrets(SweConfig(llm_model=model))}


@pytest.mark.parametrize(
    ("model", "keys", "said"),
    [
        ("azure/mine", AZURE[:1], "export AZURE_API_BASE$"),
        (
            "bedrock/anthropic.claude",
            (AWS[0], AWS[2]),
            "export AWS_BEARER_TOKEN_BEDROCK or AWS_SECRET_ACCESS_KEY$",
        ),
        # Nothing but the worker's LiteLLM knows whose these are.
        ("anthropic.claude-3-5-sonnet-20240620-v1:0", (), "write bedrock/anthropic.claude"),
        ("gemini-2.5-pro", ("GEMINI_API_KEY",), r"JSON of a service .* write gemini/gemini-2\.5"),
    ],
)
def test_a_missing_variable_is_said(
    python: str, model: str, keys: tuple[str, ...], said: str
) -> None:
    with pytest.raises(FatalJobError, match=said):
        found(python, model, keys=keys)


@pytest.mark.parametrize(
    ("model", "names", "key"),
    [
        ("azure/mine", AZURE, "AZURE_API_KEY"),
        ("bedrock/anthropic.claude", AWS[2:], "AWS_BEARER_TOKEN_BEDROCK"),
        ("watsonx/mine", ("WATSONX_URL", "WATSONX_PROJECT_ID"), "WATSONX_APIKEY"),
    ],
)
def test_a_key_that_is_named_takes_its_variables_place(
    python: str, model: str, names: tuple[str, ...], key: str
) -> None:
    endpoint = found(python, model, llm_api_key_env="MY_KEY", keys=(*names, "MY_KEY"))
    assert endpoint.variables == {name: name for name in names} | {key: "MY_KEY"}
    with pytest.raises(FatalJobError, match="MY_KEY is not set"):
        found(python, model, llm_api_key_env="MY_KEY", keys=names)


def test_a_key_for_who_takes_none_is_said(python: str) -> None:
    with pytest.raises(FatalJobError, match="remove llm_api_key_env and export AWS_ACCESS_KEY_ID"):
        found(python, "sagemaker_chat/mine", llm_api_key_env="MY_KEY", keys=(*AWS, "MY_KEY"))


def test_the_key_of_one_provider_does_not_go_to_the_one_that_litellm_takes_a_name_for(
    python: str,
) -> None:
    with pytest.raises(NotSupported, match="for a model of provider openai"):
        found(python, "azure/command-r-plus", keys=(*KEYS, *AZURE))


@pytest.mark.parametrize("model", ["azure/mine", "bedrock/anthropic.claude"])
def test_an_address_is_spoken_to_in_openais_protocol_whatever_the_provider(
    python: str, model: str
) -> None:
    endpoint = found(
        python, model, llm_base_url="http://10.0.0.5/v1", llm_api_key_env="MY_KEY",
        keys=(*AZURE, *AWS, "MY_KEY"),
    )  # fmt: skip
    assert (endpoint.model, endpoint.key, endpoint.proxied) == (f"openai/{model}", "MY_KEY", True)
    assert endpoint.variables == {}


def test_a_price_that_nobody_knows_is_not_nothing(python: str) -> None:
    names = ("SNOWFLAKE_JWT", "SNOWFLAKE_ACCOUNT_ID")
    model = "snowflake/claude-3-5-sonnet"
    assert found(python, model, keys=names).prices.input is None
    with pytest.raises(FatalJobError, match="nobody knows what"):
        found(python, model, keys=names, max_budget_total=1.0)


def test_a_provider_whose_package_is_not_there_is_said(
    python: str, answers: Mapping[str, Any]
) -> None:
    model = "vertex_ai/gemini-2.5-pro"
    if answers[model]["missing"] is None:
        pytest.skip("the agents' environment has google-cloud-aiplatform")
    with pytest.raises(EngineUnavailable, match="google-cloud-aiplatform; install"):
        found(python, model, keys=VERTEX)


def test_vertex_is_reached_where_its_package_is(
    python: str, answers: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = "vertex_ai/gemini-2.5-pro"
    monkeypatch.setitem(answers[model], "missing", None)
    assert found(python, model, keys=VERTEX).variables == {name: name for name in VERTEX}


def test_no_other_providers_key_is_taken_in_its_place(python: str) -> None:
    with pytest.raises(FatalJobError, match=r"provider deepseek.*DEEPSEEK_API_KEY is not set"):
        found(python, "deepseek/deepseek-chat", keys=("OPENAI_API_KEY", "ANTHROPIC_API_KEY"))


@pytest.mark.parametrize(
    ("address", "key"),
    [("https://api.openai.com/v1", "OPENAI_API_KEY"), ("http://10.0.0.5:8000/v1", None)],
)
def test_a_server_of_ones_own_gets_no_key_that_was_not_named(
    python: str, address: str, key: str | None
) -> None:
    assert found(python, "gpt-4o", llm_base_url=address).key == key


@pytest.mark.parametrize(
    ("model", "sent"),
    [
        ("your-org/your-model", "openai/your-org/your-model"),
        ("accounts/fireworks/models/m", "openai/accounts/fireworks/models/m"),
        ("openai/gpt-oss-20b", "openai/openai/gpt-oss-20b"),
        ("anthropic/claude-sonnet-4.5", "openai/anthropic/claude-sonnet-4.5"),
        ("hosted_vllm/org/m", "openai/org/m"),
    ],
)
def test_an_address_is_spoken_to_in_openais_protocol_with_the_name_as_it_is(
    python: str, model: str, sent: str
) -> None:
    endpoint = found(python, model, llm_base_url="http://10.0.0.5:8000/v1")
    assert (endpoint.model, endpoint.proxied) == (sent, True)
