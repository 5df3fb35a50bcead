"""The model of a job of coding agents: who answers for it, at what address, with whose key.

With ``llm_base_url`` the server there is spoken to in OpenAI's protocol, with the model's name as
the job has it. Without, LiteLLM says whose the name is. Whoever speaks OpenAI's protocol is reached
through the worker's proxy; the key of anyone else goes to the agent, and so do the variables of
those that one key does not open.
"""

from __future__ import annotations

__all__ = ["find_endpoint"]

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from spider_sdk.config.llm_keys import (
    KEYLESS,
    PROVIDER_KEYS,
    PROVIDER_VARIABLES,
    ProviderVariables,
    address_key,
)
from spider_sdk.config.model import SweConfig
from spider_sdk.errors import EngineUnavailable, FatalJobError, NotSupported
from spider_worker.agents.interpreter import agent_python, ask_model
from spider_worker.agents.proxy import Prices
from spider_worker.pipelines.swe_agent.parts import Ctx, Endpoint
from spider_worker.settings import WorkerSettings

#: Providers whose models are no chat models, to whom a person logs in, or who sign with a file.
_UNSERVED: Final = frozenset(
    {"azure_text", "bedrock_converse", "chatgpt", "github_copilot", "oci", "ragflow", "sagemaker",
     "vertex_ai_beta", "watsonx_text"}
)  # fmt: skip
#: Names under which LiteLLM leaves a provider's models to another one, which takes the same.
_LEFT_TO: Final = frozenset({("azure_ai", "azure")})
#: Words of LiteLLM's for OpenAI's protocol that are no server's name for a model's owner.
_PROTOCOLS: Final = ("hosted_vllm/", "litellm_proxy/", "custom_openai/", "openai_like/")
#: Addresses that LiteLLM keeps to itself.
_ADDRESSES: Final[Mapping[str, str]] = {
    "ollama": "http://localhost:11434/v1",
    "ollama_chat": "http://localhost:11434/v1",
    "openai": "https://api.openai.com/v1",
    "openrouter": "https://openrouter.ai/api/v1",
}
#: They have a protocol of their own, and OpenAI's beside it.
_OLLAMA: Final = ("ollama", "ollama_chat")


async def find_endpoint(settings: WorkerSettings, ctx: Ctx) -> Endpoint:
    """Raises FatalJobError for a name that is no model's, a key that is missing, and a cap on
    money where nobody knows the price; NotSupported for providers that no variables open;
    EngineUnavailable where the agents' environment lacks what a provider is reached with."""
    job = ctx.job
    python = agent_python(settings.agent_python)
    if job.llm_base_url is not None:
        found = await ask_model(python, job.llm_model)
        name = job.llm_model
        for prefix in _PROTOCOLS:
            name = name.removeprefix(prefix)
        key = _key(ctx, address_key(job.llm_base_url), where=job.llm_base_url)
        # The prefix tells LiteLLM the protocol; the server is sent what stands behind it.
        endpoint = Endpoint(f"openai/{name}", job.llm_base_url, key, True, _prices(job, found))
        return _capped(job, _versioned(endpoint, found))
    named = job.llm_model.partition("/")[0]
    _check_served(named, job.llm_model)
    found = await ask_model(python, job.llm_model)
    provider = found["provider"]
    if provider is None:
        raise FatalJobError(
            f"llm_model: {job.llm_model} is no name that LiteLLM knows a provider of; write "
            "provider/model (for instance anthropic/claude-sonnet-4-5), or give llm_base_url for a "
            "server that speaks OpenAI's protocol"
        )
    _check_served(provider, job.llm_model)
    if named in PROVIDER_VARIABLES:
        if provider != named and (named, provider) not in _LEFT_TO:
            # The key of one would go to the other.
            raise NotSupported(
                f"llm_model: LiteLLM takes {job.llm_model} for a model of provider {provider}; "
                "write a name that it knows of, or give llm_base_url for a server that speaks "
                "OpenAI's protocol"
            )
        provider = named
    way = _by_variables if provider in PROVIDER_VARIABLES else _by_key
    endpoint = way(ctx, provider, found)
    return _capped(job, _versioned(endpoint, found))


def _by_variables(ctx: Ctx, provider: str, found: Mapping[str, Any]) -> Endpoint:
    """Where a provider answers that a key alone does not open."""
    job = ctx.job
    variables = _variables(ctx, provider, PROVIDER_VARIABLES[provider])
    if found["missing"] is not None:
        raise EngineUnavailable(
            f"llm_model: {job.llm_model} is a model of LiteLLM's provider {provider}, which is "
            f"reached with {found['missing']}; install that in the agents' environment of this "
            "worker"
        )
    return Endpoint(job.llm_model, None, None, False, _prices(job, found), variables=variables)


def _by_key(ctx: Ctx, provider: str, found: Mapping[str, Any]) -> Endpoint:
    """Where a provider answers that one key opens, or none."""
    job = ctx.job
    if provider in PROVIDER_KEYS:
        key = _key(ctx, PROVIDER_KEYS[provider], where=f"provider {provider}")
    elif job.llm_api_key_env is not None or provider in KEYLESS:
        key = _key(ctx, (), where=f"provider {provider}")
    else:
        raise FatalJobError(
            f"llm_model: {job.llm_model} is a model of LiteLLM's provider {provider}, and it is not"
            " known which variable its key is in; set llm_api_key_env to that"
        )
    prices = _prices(job, found)
    if not (found["compatible"] or provider in _OLLAMA):
        return Endpoint(job.llm_model, None, key, False, prices)
    address = _ADDRESSES.get(provider) or found["api_base"]
    if address is None:
        raise FatalJobError(
            f"llm_model: nobody knows the address of {job.llm_model}; give llm_base_url, and the "
            "model's name as the server there has it"
        )
    model = job.llm_model
    if provider in _OLLAMA:
        model = f"openai/{model.partition('/')[2]}"
    return Endpoint(model, address, key, True, prices)


def _check_served(provider: str, model: str) -> None:
    if provider not in _UNSERVED:
        return
    raise NotSupported(
        f"llm_model: {model} is a model of LiteLLM's provider {provider}, which keys alone do not "
        "open; give llm_base_url (of LiteLLM's proxy, say), and the model's name as it is there"
    )


def _variables(ctx: Ctx, provider: str, asked: ProviderVariables) -> dict[str, str]:
    """What ``provider`` is reached with, by LiteLLM's names. Raises FatalJobError where something
    is missing."""
    job = ctx.job
    said = f"llm_model: {job.llm_model} is a model of LiteLLM's provider {provider}"
    found = {name: ctx.secrets[name] for name in asked.names if ctx.secrets.get(name)}
    if job.llm_api_key_env is not None:
        if asked.key is None:
            raise FatalJobError(
                f"{said}, which takes no key by itself; remove llm_api_key_env and export "
                f"{_listed(asked.needed)}"
            )
        key = _key(ctx, (), where=f"provider {provider}")
        assert key is not None
        found[asked.key] = key
    missing = [names for names in asked.needed if not found.keys() & set(names)]
    if not missing:
        return found
    also = ""
    if provider == "vertex_ai":
        also = (
            " (VERTEXAI_CREDENTIALS holds the JSON of a service account; with GEMINI_API_KEY "
            f"alone, write gemini/{job.llm_model.rpartition('/')[2]})"
        )
    if not job.llm_model.startswith(f"{provider}/"):
        also += f", and write {provider}/{job.llm_model}, so that it is forwarded"
    raise FatalJobError(
        f"{said}, and something is missing where the job was submitted: export "
        f"{_listed(missing)}{also}"
    )


def _listed(needed: Sequence[Sequence[str]]) -> str:
    return ", and ".join(" or ".join(names) for names in needed)


def _key(ctx: Ctx, usual: tuple[str, ...], *, where: str) -> str | None:
    """The key in the variable that the job names, else in the usual one; None where neither is
    named. Raises FatalJobError where one is, and is not there."""
    named = ctx.job.llm_api_key_env
    names = (named,) if named is not None else usual
    for name in names:
        if ctx.secrets.get(name):
            return ctx.secrets[name]
    if not names:
        return None
    raise FatalJobError(
        f"llm_model: {ctx.job.llm_model} needs a key ({where}), and {' or '.join(names)} is not "
        "set where the job was submitted; export it, or set llm_api_key_env to the variable that "
        "holds it"
    )


def _prices(job: SweConfig, found: Mapping[str, Any]) -> Prices:
    def first(given: float | None, known: Any) -> float | None:
        return given if given is not None else known

    return Prices(
        first(job.input_cost_per_token, found["input_cost_per_token"]),
        first(job.output_cost_per_token, found["output_cost_per_token"]),
    )


def _versioned(endpoint: Endpoint, found: Mapping[str, Any]) -> Endpoint:
    return dataclasses.replace(endpoint, versions=found.get("versions", {}))


def _capped(job: SweConfig, endpoint: Endpoint) -> Endpoint:
    capped = job.max_budget_per_instance is not None or job.max_budget_total is not None
    if capped and None in (endpoint.prices.input, endpoint.prices.output):
        raise FatalJobError(
            f"there is a cap on money, and nobody knows what {job.llm_model} costs: give "
            "input_cost_per_token and output_cost_per_token (dollars a token; 0 for a model of "
            "your own)"
        )
    return endpoint
