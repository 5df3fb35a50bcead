"""The format of a job: which keys a section knows and what their values may be.

Defaults stand in ``model.py``; rules over several keys in ``rules.py``.
"""

from __future__ import annotations

__all__ = [
    "CONFIG_NAME",
    "LOSSES",
    "NO_SERVER",
    "PROVIDERS",
    "REPO_ID",
    "InputFileSchema",
    "JobSchema",
    "Model",
    "RemoteModelSchema",
    "Root",
    "RootSchema",
    "ServerSchema",
    "Shuffle",
    "Teacher",
    "TeacherSchema",
]

import dataclasses
from typing import Any, Final

from marshmallow import ValidationError, fields

from spider_sdk.config import model
from spider_sdk.config.fields import (
    Choice,
    Fraction,
    Items,
    JsonMapping,
    Matching,
    Nested,
    Number,
    PlainList,
    Scalar,
    Section,
    Switch,
    Text,
    TextMapping,
    Url,
    VariableName,
    Whole,
)
from spider_sdk.config.names import env_name_problem

PROVIDERS: Final = ("vllm", "openai", "transformers", "tinker", "local")
LOSSES: Final = ("importance_sampling", "ppo", "cispo")
SIGNALS: Final = ("auto", "sampled", "topk", "full")

_REMOTE: Final = frozenset({"openai", "tinker"})
_ENDPOINT_KEYS: Final = frozenset({"base_url", "api_key", "api_key_env"})
_SAMPLING: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
REPO_ID: Final = r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]{0,94}[\w]?/[A-Za-z0-9_]([\w.-]{0,94}\w)?"
#: It becomes a folder of the repository: not "..", then.
CONFIG_NAME: Final = (
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}",
    "ASCII letters, digits, '-', '_' and '.', a letter or digit first",
)

_HOMES: dict[str, str] = {
    name: f"sampling parameters such as {name} belong under job.generation.parameters"
    for name in _SAMPLING
}


class _JobSection(Section):
    elsewhere = _HOMES


class ServerSchema(Section):
    builds = model.ServerConfig
    base_url = Url()
    api_key = Text()
    request_timeout = Number(above=0)
    verify_tls = Switch()
    headers = TextMapping()


class PricingSchema(_JobSection):
    builds = model.Pricing
    input_per_million = Number(least=0)
    output_per_million = Number(least=0)


class _ModelSchema(_JobSection):
    builds = model.ModelConfig
    provider = Choice(PROVIDERS, required=True)
    name = Text(required=True)
    parameters = JsonMapping()
    student_checkpoint_path = Text()
    pricing = Nested(PricingSchema)


class RemoteModelSchema(_ModelSchema):
    base_url = Url()
    api_key = Text()
    api_key_env = VariableName()


class _LocalModelSchema(_ModelSchema):
    """A model that the worker runs itself has no address and no key."""

    may_be_empty = _ENDPOINT_KEYS
    elsewhere = _HOMES | dict.fromkeys(
        _ENDPOINT_KEYS,
        "this provider runs the model in the worker itself; a model behind an address takes "
        "provider openai (any OpenAI-compatible server) or tinker",
    )


class Model(fields.Field[model.ModelConfig]):
    """The model section, whose keys depend on its provider."""

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> Any:
        provider = value.get("provider") if isinstance(value, dict) else None
        local = isinstance(provider, str) and provider in PROVIDERS and provider not in _REMOTE
        return (_LocalModelSchema() if local else RemoteModelSchema()).load(value)


class InputFileSchema(_JobSection):
    builds = model.InputFile
    name = Matching(
        r"(?!\.{1,2}$)[^/\\\x00-\x1f]{1,255}", "a file's name without folders", required=True
    )
    sha256 = Matching(r"[0-9a-f]{64}", "64 hexadecimal digits in lower case", required=True)


class Shuffle(Scalar):
    def check(self, value: Any) -> bool | int:
        if not isinstance(value, int):
            raise ValueError("expected true, false or a seed (a whole number)")
        return value


class SourceSchema(_JobSection):
    builds = model.SourceConfig
    dataset = Text(required=True)
    config_name = Text()
    split = Text()
    field = Text()
    revision = Text()
    streaming = Switch()
    max_examples = Whole(least=1)
    shuffle = Shuffle()
    options = JsonMapping()
    inputs = Items(InputFileSchema)


class TeacherSchema(_JobSection):
    builds = model.TeacherConfig
    name = Text(required=True)
    provider = Choice(PROVIDERS)
    base_url = Url()
    api_key = Text()
    api_key_env = VariableName()
    system_prompt = Text()
    parameters = JsonMapping()
    weight = Number(above=0)
    when = JsonMapping()
    signal = Choice(SIGNALS)


class Teacher(fields.Field[tuple[model.TeacherConfig, ...]]):
    """A name, a mapping, or a list of either."""

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> tuple[model.TeacherConfig, ...]:
        if not isinstance(value, list):
            return (self._one(value),)
        if not value:
            raise ValidationError("expected at least one teacher")
        teachers: list[model.TeacherConfig] = []
        errors: dict[str | int, Any] = {}
        for number, item in enumerate(value):
            try:
                teachers.append(self._one(item))
            except ValidationError as error:
                errors[number] = error.messages
        if errors:
            raise ValidationError(errors)
        return tuple(teachers)

    def _one(self, value: Any) -> model.TeacherConfig:
        if isinstance(value, str) and value.strip():
            return model.TeacherConfig(name=value)
        if not isinstance(value, dict):
            raise ValidationError(
                "expected a model's name, a mapping with a name, or a list of them"
            )
        teacher = TeacherSchema().load(value)
        assert isinstance(teacher, model.TeacherConfig)
        return teacher


class OnPolicySchema(_JobSection):
    builds = model.OnPolicyOptions
    teacher = Teacher(required=True, error_messages={"required": "required: the model that scores"})
    api_key = Text()
    api_key_env = VariableName()
    learning_rate = Number(above=0)
    lr_schedule = Choice(("constant", "linear"))
    groups_per_batch = Whole(least=1)
    group_size = Whole(least=1)
    max_tokens = Whole(least=1)
    lora_rank = Whole(least=1)
    num_substeps = Whole(least=1)
    kl_penalty_coef = Number(least=0)
    kl_discount_factor = Fraction()
    loss_fn = Choice(LOSSES)
    compute_post_kl = Switch()
    eval_every = Whole(least=0)
    save_every = Whole(least=0)
    token_budget = Whole(least=1)
    student_checkpoint_path = Text()
    wandb_project = Text()
    wandb_name = Text()
    seed = Whole(least=0)
    epochs = Whole(least=1)
    eval_examples = Whole(least=1)
    advantage_clip = Number(least=0)
    baseline = Choice(("none", "position"))
    min_coverage = Fraction()
    tracker = Choice(("wandb", "trackio"))


class GenerationSchema(_JobSection):
    builds = model.GenerationConfig
    parameters = JsonMapping()
    on_policy = Switch()
    on_policy_options = Nested(OnPolicySchema)
    duplications = Whole(least=1)
    max_batch_size = Whole(least=1)
    seed = Whole(least=0)
    system_prompt = Text(empty=True)
    upload_every = Whole(least=0)


class HubSchema(_JobSection):
    builds = model.HubConfig
    repo_id = Matching(REPO_ID, "owner/name of letters, digits, '-', '_' and '.'", required=True)
    repo_type = Choice(("dataset", "model"))
    private = Switch()
    config_name = Matching(*CONFIG_NAME)


class OutputSchema(_JobSection):
    builds = model.OutputConfig
    mode = Choice(("return", "upload_hf"))
    local_path = Text()
    format = Choice(("json", "jsonl", "parquet"))
    hf = Nested(HubSchema)


class RuntimeSchema(_JobSection):
    builds = model.RuntimeConfig
    packages = PlainList(
        Matching(r"[A-Za-z0-9].*", "a requirement such as numpy>=2 (no pip options)")
    )
    env = TextMapping(env_name_problem)


_Function = Matching(r"[^\W\d]\w*", "the name of a function", required=True)


class ProcessorSchema(_JobSection):
    builds = model.ProcessorConfig
    name = _Function
    source = Text(required=True)
    kwargs = JsonMapping()


class ToolSchema(_JobSection):
    builds = dict
    name = _Function
    description = Text()
    json_schema = JsonMapping()
    source = Text(required=True)
    kwargs = JsonMapping()


def _job(**sections: Any) -> model.JobConfig:
    """A job whose Hub repository has the type that fits it, unless the document says which."""
    job = model.JobConfig(**sections)
    hub = job.output.hf
    if job.generation.on_policy and hub is not None and hub.repo_type != "model":
        hub = dataclasses.replace(hub, repo_type="model")
        job = dataclasses.replace(job, output=dataclasses.replace(job.output, hf=hub))
    return job


class JobSchema(_JobSection):
    builds = staticmethod(_job)
    model = Model(required=True, error_messages={"required": "required, and not given"})
    source = Nested(SourceSchema, required=True)
    generation = Nested(GenerationSchema)
    output = Nested(OutputSchema)
    metadata = JsonMapping()
    runtime = Nested(RuntimeSchema)
    pre_processor = Nested(ProcessorSchema)
    post_processor = Nested(ProcessorSchema)
    evaluator = Nested(ProcessorSchema)
    tools = Items(ToolSchema)
    parallelism = Whole(least=1)
    shard_size = Whole(least=1)


NO_SERVER: Final = model.ServerConfig()


@dataclasses.dataclass(frozen=True)
class Root:
    """A whole file: ``job`` or ``swe``."""

    server: model.ServerConfig = NO_SERVER
    job: model.JobConfig | None = None
    swe: model.SweConfig | None = None


class RootSchema(Section):
    builds = Root
    server = Nested(ServerSchema)
    job = Nested(JobSchema, required=True)


def _learn_homes() -> None:
    """Let every section say of another section's key where it belongs, if that is one place."""
    places = {
        "job": JobSchema,
        "job.model": RemoteModelSchema,
        "job.model.pricing": PricingSchema,
        "job.source": SourceSchema,
        "job.generation": GenerationSchema,
        "job.generation.on_policy_options": OnPolicySchema,
        "job.output": OutputSchema,
        "job.output.hf": HubSchema,
        "job.runtime": RuntimeSchema,
        "server": ServerSchema,
    }
    found: dict[str, list[str]] = {}
    for place, schema in places.items():
        for key in schema().fields:
            found.setdefault(key, []).append(place)
    for key, homes in found.items():
        if len(homes) == 1:
            _HOMES.setdefault(key, f"{key} belongs under {homes[0]}")


_learn_homes()
