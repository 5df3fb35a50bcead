"""The format of a job as JSON Schema, for clients that are written without this package.

Made from the schemas that check a document, so that the two cannot differ. Rules over several
keys (``rules.py``) have no place in it; the server tells of those by path.
"""

from __future__ import annotations

__all__ = ["job_schema", "swe_job_schema"]

from typing import Any, Final

from marshmallow import fields as marshmallow_fields

from spider_sdk.config import fields, schema, swe_schema

Described = dict[str, Any]

_SAID: Final = {
    "model.provider": "vllm and transformers run in the worker; openai is any OpenAI-compatible "
    "server. A student is trained by tinker (the service), or in the worker: local (vLLM samples "
    "from it on a GPU, where it is installed, else torch), transformers (torch samples), vllm.",
    "model.base_url": "Of provider openai or tinker. Without one: the provider's own.",
    "model.api_key": "Taken out of the job before it is stored; better sent in env, under the "
    "name in api_key_env.",
    "model.parameters": "Arguments of the engine, by its own names.",
    "source.dataset": "A data set on the Hub; or, with inputs, what the uploaded data is called.",
    "source.field": "The column that holds the prompt. Needed unless there is a pre_processor.",
    "source.shuffle": "A seed, or true for the job's.",
    "source.inputs": "Local data, uploaded beforehand: PUT each file's bytes to "
    "/v1/inputs/{sha256} and name it here. The suffix of the name tells its format (.jsonl, "
    ".json, .csv, .tsv, .parquet, .arrow, .txt, also compressed).",
    "generation.parameters": "Sampling parameters: temperature, top_p, max_tokens and so on.",
    "generation.on_policy": "Train model.name as a student instead of generating rows with it.",
    "generation.on_policy_options.teacher": "What scores the student's samples: a model's name, a "
    "mapping, or a list of them.",
    "generation.on_policy_options.lr_schedule": "linear lowers learning_rate to 0 "
    "by the run's end.",
    "generation.on_policy_options.save_every": "Batches between checkpoints; 0: at the end only.",
    "generation.on_policy_options.eval_every": "Batches between evaluations; 0: before and after "
    "the run only.",
    "generation.on_policy_options.token_budget": "The run ends once so many tokens were sampled.",
    "generation.duplications": "Samples of each prompt.",
    "generation.max_batch_size": "At most so many requests in flight in one runner.",
    "generation.upload_every": "Push to the Hub after so many finished rows; 0: at the end.",
    "output.mode": "return keeps the rows for download; upload_hf also pushes them, with HF_TOKEN "
    "from env.",
    "output.local_path": "Where the client saves the result; a worker never opens it.",
    "runtime.packages": "pip requirements of the processors.",
    "runtime.env": "Plain variables for the processors. Secrets belong in env, beside the job.",
    "pre_processor": "Makes a prompt of a row: text, a list of messages, an object or null "
    "(drop the row). source is Python text that defines name; it is called with the row and "
    "kwargs.",
    "post_processor": "Makes an object of a record, or null (drop it). As pre_processor.",
    "evaluator": "Scores the student of an on-policy job: called with a held-out row and its "
    "greedy completion, it returns a number, true or false, or an object of them. As "
    "pre_processor.",
    "parallelism": "Workers at once on this job. Without one: as many as are free.",
    "swe.dataset": "A data set of tasks on the Hub; or, with inputs, the name of the input that is "
    "the data set (JSON lines).",
    "swe.inputs": "Uploaded beforehand: PUT each file's bytes to /v1/inputs/{sha256} and name it "
    "here. Rows of the data set name an uploaded git bundle in repo_source as input:<sha256>.",
    "swe.instance_filter": "A regular expression that an instance's id matches from its start.",
    "swe.llm_model": "A LiteLLM name; with llm_base_url, the name that the server there has.",
    "swe.llm_base_url": "Of a server that speaks OpenAI's protocol.",
    "swe.condenser": "true (the SDK's default one), false, or options of the summarising one.",
    "swe.llm_api_key": "Taken out of the job before it is stored; better sent in env, under the "
    "name in llm_api_key_env.",
    "swe.num_workers": "Instances at a time, over all workers.",
    "swe.max_retries": "Fresh attempts of an instance after its first.",
    "swe.n_attempts": "Independent runs of each instance.",
    "swe.timeout_seconds": "Of one run of an instance.",
    "swe.max_budget_per_instance": "US dollars, set aside when an instance begins.",
    "swe.max_budget_total": "US dollars. What cannot be begun within them is left out.",
    "swe.eval_output_dir": "Where the client puts the results; a worker never opens it.",
    "shard_size": "Rows in one unit of work. Without one: chosen by the server.",
}


def job_schema() -> Described:
    """JSON Schema (2020-12) of the ``job`` of a submission. A new object each time."""
    return _section(schema.JobSchema(), "")


def swe_job_schema() -> Described:
    """JSON Schema (2020-12) of a SWE job as it is submitted. A new object each time."""
    return {
        "type": "object",
        "properties": {"swe": _section(swe_schema.SweSchema(), "swe")},
        "required": ["swe"],
        "additionalProperties": False,
    }


def _section(section: fields.Section, path: str) -> Described:
    properties = {}
    for name, field in section.fields.items():
        here = f"{path}.{name}" if path else name
        described = _field(field, here)
        if not field.required:
            described = _or_nothing(described)
        if here in _SAID:
            described["description"] = _SAID[here]
        properties[name] = described
    required = [name for name, field in section.fields.items() if field.required]
    made: Described = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**made, "required": required} if required else made


def _or_nothing(described: Described) -> Described:
    """An empty value counts as not given."""
    if "enum" in described:
        return {**described, "enum": [*described["enum"], None]}
    if isinstance(described.get("type"), str):
        return {**described, "type": [described["type"], "null"]}
    return {"anyOf": [*described["anyOf"], {"type": "null"}]}


def _field(field: marshmallow_fields.Field[Any], path: str) -> Described:
    if isinstance(field, fields.Nested):
        section = field.schema
        assert isinstance(section, fields.Section)
        return _section(section, path)
    if isinstance(field, fields.Items):
        return {"type": "array", "items": _section(field.section(), path)}
    if isinstance(field, fields.PlainList):
        return {"type": "array", "items": _field(field.inner, path)}
    if isinstance(field, schema.Model):
        return _section(schema.RemoteModelSchema(), path)
    if isinstance(field, schema.Teacher):
        one: list[Described] = [{"type": "string"}, _section(schema.TeacherSchema(), path)]
        return {"anyOf": [*one, {"type": "array", "items": {"anyOf": one}, "minItems": 1}]}
    if isinstance(field, swe_schema.Condenser):
        options = _section(swe_schema.CondenserSchema(), f"{path}.options")
        return {"anyOf": [{"type": "boolean"}, options]}
    if isinstance(field, schema.Shuffle):
        return {"anyOf": [{"type": "boolean"}, {"type": "integer"}]}
    return _value(field)


def _value(field: marshmallow_fields.Field[Any]) -> Described:
    if isinstance(field, fields.Choice):
        return {"enum": list(field.choices)}
    if isinstance(field, fields.Matching):
        return {"type": "string", "pattern": f"^(?:{field.pattern.pattern})$"}
    if isinstance(field, fields.Url):
        return {"type": "string", "format": "uri"}
    if isinstance(field, fields.Text):
        return {"type": "string"} if field.empty else {"type": "string", "pattern": r"\S"}
    if isinstance(field, fields.Switch):
        return {"type": "boolean"}
    if isinstance(field, fields.Number):
        return {"type": "integer" if isinstance(field, fields.Whole) else "number", **field.limits}
    if isinstance(field, fields.JsonMapping):
        return {"type": "object"}
    if isinstance(field, fields.TextMapping):
        return {"type": "object", "additionalProperties": {"type": "string"}}
    raise TypeError(f"{type(field).__name__} has no description yet: say here what it takes")
