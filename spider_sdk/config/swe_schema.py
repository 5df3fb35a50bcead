"""The format of a SWE job: its keys, and what their values may be.

Defaults stand in ``model.py``; rules over several keys in ``rules.py``.
"""

from __future__ import annotations

__all__ = ["Condenser", "CondenserSchema", "EndpointUrl", "SweRootSchema", "SweSchema"]

from collections.abc import Callable
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

from marshmallow import ValidationError, fields

from spider_sdk.config import model
from spider_sdk.config.fields import (
    Choice,
    Items,
    Matching,
    Nested,
    Number,
    Section,
    Switch,
    Text,
    Url,
    VariableName,
    Whole,
    nearest,
)
from spider_sdk.config.schema import (
    CONFIG_NAME,
    NO_SERVER,
    REPO_ID,
    InputFileSchema,
    Root,
    ServerSchema,
)

#: Names of condensers elsewhere, and what is written here instead.
_MEANT: Final = {
    "default": "true", "llm": "true", "on": "true", "summarizing": "true", "true": "true",
    "yes": "true",
    "false": "false", "no": "false", "none": "false", "noop": "false", "null": "false",
    "off": "false",
}  # fmt: skip


class EndpointUrl(Url):
    """The address that a model's API begins at. What stands behind it would get lost where paths
    are put to it, and could be a key, which is no part of a document that is kept."""

    def check(self, value: Any) -> str:
        text = super().check(value)
        parts = urlsplit(text)
        if parts.query or parts.fragment or text.endswith(("?", "#")):
            raise ValueError(
                "expected an address with nothing behind its path (no ? and no #); a key belongs "
                "in the variable that llm_api_key_env names"
            )
        return text


class CondenserSchema(Section):
    """The options of the SDK's condenser that summarises."""

    builds = dict
    max_size = Whole(least=1)
    max_tokens = Whole(least=1)
    keep_first = Whole(least=0)
    minimum_progress = Number(above=0, below=1)
    hard_context_reset_max_retries = Whole(least=1)
    hard_context_reset_context_scaling = Number(above=0, below=1)


class Condenser(fields.Field[Any]):
    """true (the SDK's default one), false, or a mapping of the summarising one's options."""

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> Any:
        if isinstance(value, bool):
            return value
        if isinstance(value, dict):
            return CondenserSchema().load(value)
        said = f"expected true, false or a mapping of {', '.join(CondenserSchema().fields)}"
        if isinstance(value, str):
            meant = nearest(value, _MEANT)
            said += f" (did you mean {_MEANT[meant]}?)" if meant else ""
        raise ValidationError(said)


class SweSchema(Section):
    builds: ClassVar[Callable[..., Any]] = model.SweConfig
    llm_model = Text(required=True)
    dataset = Text()
    split = Text()
    max_instances = Whole(least=1)
    instance_filter = Text()
    seed = Whole(least=0)
    leave_out = Text()
    agent_class = Choice(("CodeActAgent", "Agent"))
    max_iterations = Whole(least=1)
    llm_base_url = EndpointUrl()
    llm_api_key = Text()
    llm_api_key_env = VariableName()
    temperature = Number(least=0)
    condenser = Condenser()
    workspace = Choice(("docker", "bwrap", "local"))
    num_workers = Whole(least=1)
    n_attempts = Whole(least=1)
    max_retries = Whole(least=0)
    timeout_seconds = Number(above=0)
    max_budget_per_instance = Number(above=0)
    max_budget_total = Number(above=0)
    input_cost_per_token = Number(least=0)
    output_cost_per_token = Number(least=0)
    messages_format = Choice(("text", "openai"))
    evaluate = Switch()
    push_filter = Choice(("all", "finished", "resolved"))
    hf_repo_id = Matching(REPO_ID, "owner/name of letters, digits, '-', '_' and '.'")
    hf_private = Switch()
    hf_config_name = Matching(*CONFIG_NAME)
    eval_output_dir = Text()
    inputs = Items(InputFileSchema)


def _swe_root(server: model.ServerConfig = NO_SERVER, **swe: Any) -> Root:
    return Root(server=server, swe=model.SweConfig(**swe))


class SweRootSchema(SweSchema):
    """A SWE file: its keys at the root, beside ``server``."""

    builds = staticmethod(_swe_root)
    elsewhere: ClassVar[dict[str, str]] = {
        "job": "a file is either a job (server, job) or a SWE job (keys at the root), not both"
    }
    server = Nested(ServerSchema)
