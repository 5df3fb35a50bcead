"""The model that an agent asks, with what its provider is reached with.

Agents' commands inherit this process's environment, so no key is ever put there: what LiteLLM looks
up by the name of a variable it finds in a secret manager in memory.
"""

from __future__ import annotations

__all__ = ["make_llm"]

from collections.abc import Mapping
from typing import Any, Final

import litellm
from litellm.integrations.custom_secret_manager import CustomSecretManager
from litellm.types.secret_managers.main import KeyManagementSettings, KeyManagementSystem
from openhands.sdk import LLM

#: What is looked for in the environment alone, by boto3 and in parts of LiteLLM; the SDK hands them
#: on in each call. The last that is set counts.
_FIELDS: Final = (
    ("AWS_ACCESS_KEY_ID", "aws_access_key_id"),
    ("AWS_SECRET_ACCESS_KEY", "aws_secret_access_key"),
    ("AWS_SESSION_TOKEN", "aws_session_token"),
    ("AWS_DEFAULT_REGION", "aws_region_name"),
    ("AWS_REGION", "aws_region_name"),
    ("AWS_REGION_NAME", "aws_region_name"),
    ("DATABRICKS_API_KEY", "api_key"),
    ("DATABRICKS_API_BASE", "base_url"),
    # The SDK has a version of its own where it is given none.
    ("AZURE_API_VERSION", "api_version"),
)


def make_llm(settings: Mapping[str, Any]) -> LLM:
    """``settings`` are arguments of the SDK's ``LLM``, the key in clear, and ``variables``: those
    that LiteLLM reads for the provider, for the rest of this process's life."""
    variables = settings.get("variables", {})
    if variables:
        _keep(variables)
    arguments = {name: value for name, value in settings.items() if name != "variables"}
    arguments |= {field: variables[name] for name, field in _FIELDS if name in variables}
    return LLM(**arguments, usage_id="agent")


class _InMemory(CustomSecretManager):
    """The variables, where LiteLLM looks before it looks into the environment."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        super().__init__("variables")
        self._variables = dict(variables)

    def sync_read_secret(self, secret_name: str, *_: Any, **_options: Any) -> str | None:
        return self._variables.get(secret_name)

    async def async_read_secret(self, secret_name: str, *_: Any, **_options: Any) -> str | None:
        return self._variables.get(secret_name)


def _keep(variables: Mapping[str, str]) -> None:
    litellm.secret_manager_client = _InMemory(variables)
    litellm._key_management_system = KeyManagementSystem.CUSTOM
    # Of others it would be an error that they are not there.
    litellm._key_management_settings = KeyManagementSettings(hosted_keys=list(variables))
