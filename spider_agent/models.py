"""``python -m spider_agent.models NAME``: what LiteLLM makes of a model's name, as JSON.

``provider`` (null: none is known), ``api_base``, ``compatible`` (whether the provider speaks
OpenAI's protocol below that address), ``input_cost_per_token`` and ``output_cost_per_token`` in
dollars (null: no price is known), ``error`` where the name is none, ``missing`` the package that
the provider is reached with where it is not there (null: none is missing); ``versions`` of the
packages that agents are made of.
"""

from __future__ import annotations

__all__ = ["describe", "main"]

import importlib.metadata
import importlib.util
import json
import sys
from typing import Any, Final

_PACKAGES: Final = ("openhands-sdk", "openhands-tools")
#: Those whom LiteLLM does not count among the compatible, since it treats them apart.
_BESIDES: Final = ("mistral", "openai", "openrouter")
#: By provider: the module that LiteLLM wants for it, and the package that brings it.
_OPTIONAL: Final = {
    "bedrock": ("boto3", "boto3"),
    "sagemaker_chat": ("boto3", "boto3"),
    "vertex_ai": ("vertexai", "google-cloud-aiplatform"),
}


def describe(name: str) -> dict[str, Any]:
    import litellm

    found: dict[str, Any] = {"provider": None, "api_base": None, "error": None}
    try:
        _, found["provider"], _, found["api_base"] = litellm.get_llm_provider(name)
    except litellm.exceptions.BadRequestError as error:
        found["error"] = str(error)
    known = (*litellm.openai_compatible_providers, *_BESIDES)
    found["compatible"] = found["provider"] in known
    found["missing"] = None
    if found["provider"] in _OPTIONAL:
        module, package = _OPTIONAL[found["provider"]]
        found["missing"] = package if importlib.util.find_spec(module) is None else None
    try:
        # Its own account of a model has 0 for a price that it does not know.
        info = litellm.model_cost[litellm.get_model_info(name)["key"]]
    except Exception:  # noqa: BLE001 - the library's word for "no such model" is a bare one
        info = {}
    for key in ("input_cost_per_token", "output_cost_per_token"):
        found[key] = info.get(key)
    found["versions"] = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return found


def main() -> None:
    sys.stdout.write(json.dumps(describe(sys.argv[1])) + "\n")


if __name__ == "__main__":
    main()
