"""Whose key a model of a SWE job is called with.

A key that went to another service than its own would be given away, so a variable is only ever
read for the provider that documents it. The client forwards what may be needed by the name alone
(``likely_keys``); the worker, which asks LiteLLM who the provider is, takes that one's
(``PROVIDER_KEYS``). Everything else is named by ``llm_api_key_env``.
"""

from __future__ import annotations

__all__ = ["KEYLESS", "PROVIDER_KEYS", "address_key", "likely_keys"]

from collections.abc import Mapping
from typing import Final

from spider_sdk.config.services import usual_key

PROVIDER_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "anthropic": ("ANTHROPIC_API_KEY",),
    "cerebras": ("CEREBRAS_API_KEY",),
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


def address_key(base_url: str) -> tuple[str, ...]:
    """The variable of the public service at this address; a server that is none of the known ones
    gets no key that was not named for it."""
    name = usual_key("openai", base_url)
    return () if name is None else (name,)
