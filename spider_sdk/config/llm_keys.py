"""Whose key a model of a SWE job is called with.

A key that went to another service than its own would be given away, so a variable is only ever
read for the provider that documents it. The client forwards what may be needed by the name alone
(``likely_keys``); the worker, which asks LiteLLM who the provider is, takes that one's
(``PROVIDER_KEYS``). Everything else is named by ``llm_api_key_env``. Providers that a key alone
does not open are reached with variables of LiteLLM's (``PROVIDER_VARIABLES``).
"""

from __future__ import annotations

__all__ = [
    "KEYLESS",
    "PLAIN_VARIABLES",
    "PROVIDER_KEYS",
    "PROVIDER_VARIABLES",
    "ProviderVariables",
    "address_key",
    "likely_keys",
    "likely_variables",
]

import dataclasses
from collections.abc import Mapping
from typing import Final

from spider_sdk.config.services import usual_key

PROVIDER_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "anthropic": ("ANTHROPIC_API_KEY",),
    "cerebras": ("CEREBRAS_API_KEY",),
    "clarifai": ("CLARIFAI_API_KEY",),
    "codestral": ("CODESTRAL_API_KEY",),
    "cohere": ("COHERE_API_KEY",),
    "cohere_chat": ("COHERE_API_KEY",),
    "dashscope": ("DASHSCOPE_API_KEY",),
    "deepinfra": ("DEEPINFRA_API_KEY",),
    "deepseek": ("DEEPSEEK_API_KEY",),
    "fireworks_ai": ("FIREWORKS_API_KEY", "FIREWORKS_AI_API_KEY"),
    "gemini": ("GEMINI_API_KEY", "GOOGLE_API_KEY"),
    "groq": ("GROQ_API_KEY",),
    "hyperbolic": ("HYPERBOLIC_API_KEY",),
    "minimax": ("MINIMAX_API_KEY",),
    "mistral": ("MISTRAL_API_KEY",),
    "moonshot": ("MOONSHOT_API_KEY",),
    "nebius": ("NEBIUS_API_KEY",),
    "novita": ("NOVITA_API_KEY",),
    "nvidia_nim": ("NVIDIA_NIM_API_KEY",),
    "openai": ("OPENAI_API_KEY",),
    "openrouter": ("OPENROUTER_API_KEY",),
    "perplexity": ("PERPLEXITYAI_API_KEY", "PERPLEXITY_API_KEY"),
    "sambanova": ("SAMBANOVA_API_KEY",),
    "together_ai": ("TOGETHER_API_KEY", "TOGETHERAI_API_KEY"),
    "vercel_ai_gateway": ("VERCEL_AI_GATEWAY_API_KEY",),
    "xai": ("XAI_API_KEY",),
    "zai": ("ZAI_API_KEY",),
}
"""By LiteLLM's provider: the variables of its key, the first that is set counts."""


@dataclasses.dataclass(frozen=True)
class ProviderVariables:
    """Of each tuple in ``needed`` one variable has to be set; all that are set are used, and those
    of ``also``. ``key`` is the one in whose place ``llm_api_key_env`` may name another (None:
    there is no such)."""

    needed: tuple[tuple[str, ...], ...]
    also: tuple[str, ...] = ()
    key: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        needed = (name for names in self.needed for name in names)
        return tuple(dict.fromkeys((*needed, *self.also)))


_AWS_REGION: Final = ("AWS_REGION_NAME", "AWS_REGION", "AWS_DEFAULT_REGION")

PROVIDER_VARIABLES: Final[Mapping[str, ProviderVariables]] = {
    "azure": ProviderVariables(
        (("AZURE_API_KEY",), ("AZURE_API_BASE",)), ("AZURE_API_VERSION",), key="AZURE_API_KEY"
    ),
    "azure_ai": ProviderVariables(
        (("AZURE_AI_API_KEY",), ("AZURE_AI_API_BASE",)),
        ("AZURE_API_VERSION",),
        key="AZURE_AI_API_KEY",
    ),
    "bedrock": ProviderVariables(
        (
            ("AWS_BEARER_TOKEN_BEDROCK", "AWS_ACCESS_KEY_ID"),
            ("AWS_BEARER_TOKEN_BEDROCK", "AWS_SECRET_ACCESS_KEY"),
            _AWS_REGION,
        ),
        ("AWS_SESSION_TOKEN", "AWS_BEDROCK_RUNTIME_ENDPOINT"),
        key="AWS_BEARER_TOKEN_BEDROCK",
    ),
    "databricks": ProviderVariables(
        (("DATABRICKS_API_KEY",), ("DATABRICKS_API_BASE",)), key="DATABRICKS_API_KEY"
    ),
    "sagemaker_chat": ProviderVariables(
        (("AWS_ACCESS_KEY_ID",), ("AWS_SECRET_ACCESS_KEY",), _AWS_REGION), ("AWS_SESSION_TOKEN",)
    ),
    "snowflake": ProviderVariables(
        (("SNOWFLAKE_JWT",), ("SNOWFLAKE_ACCOUNT_ID",)), key="SNOWFLAKE_JWT"
    ),
    "vertex_ai": ProviderVariables(
        (("VERTEXAI_CREDENTIALS",), ("VERTEXAI_PROJECT",), ("VERTEXAI_LOCATION",))
    ),
    "watsonx": ProviderVariables(
        (
            ("WATSONX_APIKEY", "WATSONX_API_KEY", "WATSONX_TOKEN", "WATSONX_ZENAPIKEY"),
            ("WATSONX_URL", "WATSONX_API_BASE"),
            ("WATSONX_PROJECT_ID", "WATSONX_SPACE_ID", "WATSONX_DEPLOYMENT_SPACE_ID"),
        ),
        key="WATSONX_APIKEY",
    ),
}
"""By LiteLLM's provider, where one key is not enough. They hold what LiteLLM says they hold, but
for credentials of Vertex AI: the JSON itself, since a path leads nowhere on a worker."""

PLAIN_VARIABLES: Final = frozenset(
    {*_AWS_REGION, "AWS_BEDROCK_RUNTIME_ENDPOINT", "AZURE_AI_API_BASE", "AZURE_API_BASE",
     "AZURE_API_VERSION", "DATABRICKS_API_BASE", "SNOWFLAKE_ACCOUNT_ID", "VERTEXAI_LOCATION",
     "VERTEXAI_PROJECT", "WATSONX_API_BASE", "WATSONX_DEPLOYMENT_SPACE_ID", "WATSONX_PROJECT_ID",
     "WATSONX_SPACE_ID", "WATSONX_URL"}
)  # fmt: skip
"""Of ``PROVIDER_VARIABLES``, those that are no secret."""

KEYLESS: Final = frozenset(
    {"docker_model_runner", "hosted_vllm", "llamafile", "lm_studio", "ollama", "ollama_chat",
     "xinference"}
)  # fmt: skip
"""Providers that are a program of one's own, which asks for no key unless told to."""

#: What bare names of the two providers begin with whose models need no ``provider/`` before them.
_BARE: Final[Mapping[str, tuple[str, ...]]] = {
    "anthropic": ("claude",),
    "openai": ("gpt-", "chatgpt-", "codex-", "o1", "o3", "o4", "ft:"),
}


def likely_keys(model: str, base_url: str | None) -> tuple[str, ...]:
    """Variables that the key of a model may be in where the job names none. Empty where only
    ``llm_api_key_env`` could say."""
    if base_url is not None:
        return address_key(base_url)
    provider, slash, _ = model.partition("/")
    if slash:
        return PROVIDER_KEYS.get(provider, ())
    for provider, starts in _BARE.items():
        if model.startswith(starts):
            return PROVIDER_KEYS[provider]
    return ()


def likely_variables(model: str, base_url: str | None, *, key_named: bool) -> tuple[str, ...]:
    """Variables that a model is reached with whose provider a key alone does not open; empty for
    others, and at an address, where OpenAI's protocol is spoken. ``key_named``: the job names its
    key itself."""
    variables = PROVIDER_VARIABLES.get(model.partition("/")[0])
    if variables is None or base_url is not None:
        return ()
    return tuple(name for name in variables.names if not (key_named and name == variables.key))


def address_key(base_url: str) -> tuple[str, ...]:
    """The variable of the public service at this address; a server that is none of the known ones
    gets no key that was not named for it."""
    name = usual_key("openai", base_url)
    return () if name is None else (name,)
