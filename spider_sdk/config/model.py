"""A loaded config: frozen dataclasses, one a section of the YAML.

Every default of the format stands here and nowhere else; the marshmallow schemas in
``schema.py`` check a document and build these. ``None`` means "not given" and each
docstring says what then happens.
"""

from __future__ import annotations

__all__ = [
    "GenerationConfig",
    "HubConfig",
    "InputFile",
    "Job",
    "JobConfig",
    "ModelConfig",
    "OnPolicyOptions",
    "OutputConfig",
    "Pricing",
    "ProcessorConfig",
    "RuntimeConfig",
    "ServerConfig",
    "SourceConfig",
    "SweConfig",
    "TeacherConfig",
]

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

from spider_sdk.jobs import Queue

JsonObject = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Where the API is. Empty ``base_url`` and ``api_key`` fall back to the settings."""

    base_url: str | None = None
    api_key: str | None = None
    request_timeout: float = 120.0  #: seconds for one request
    verify_tls: bool = True
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Pricing:
    """US dollars for a million tokens; totals are null where a price is None."""

    input_per_million: float | None = None
    output_per_million: float | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model that generates.

    ``provider`` is ``vllm``, ``openai``, ``transformers``, ``tinker`` or ``local``.
    ``parameters`` are the engine's own arguments. ``api_key`` never leaves the
    client in clear: it is lifted into ``env`` under the name ``api_key_env``.
    ``base_url`` None is the provider's own. ``student_checkpoint_path`` is where an
    on-policy student's training starts (None: at ``name``).
    """

    provider: str
    name: str
    parameters: JsonObject = dataclasses.field(default_factory=dict)
    base_url: str | None = None
    api_key: str | None = None
    api_key_env: str | None = None
    student_checkpoint_path: str | None = None
    pricing: Pricing = Pricing()


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A local file of the client's, uploaded by content; ``name`` is its base name."""

    name: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """The data set that rows come from.

    ``field`` None hands the whole row to the pre-processor (which is then needed).
    ``inputs`` are the uploaded files when ``dataset`` named a local path. ``shuffle``
    is a seed, True (the job's seed) or False. ``options`` go to ``load_dataset``.
    """

    dataset: str
    config_name: str | None = None
    split: str = "train"
    field: str | None = None
    revision: str | None = None
    streaming: bool = False
    max_examples: int | None = None
    shuffle: bool | int = False
    options: JsonObject = dataclasses.field(default_factory=dict)
    inputs: tuple[InputFile, ...] = ()


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """A frozen model that scores what the student sampled.

    ``provider`` None takes the job's; at the student's service (tinker) address and key, where not
    given, are the student's (``config.services``). Of several teachers, each takes part with its
    ``weight``; one with ``when`` scores only rows whose columns have these values (a list names
    alternatives). ``system_prompt`` is shown to the teacher alone. ``signal`` is what is asked of
    it: ``sampled`` (log-probabilities of the sampled tokens), ``topk``, ``full`` (whole
    distributions), or ``auto``, the best that it and the trainer have in common.
    """

    name: str
    provider: str | None = None
    base_url: str | None = None
    api_key: str | None = None
    api_key_env: str | None = None
    system_prompt: str | None = None
    parameters: JsonObject = dataclasses.field(default_factory=dict)
    weight: float = 1.0
    when: JsonObject = dataclasses.field(default_factory=dict)
    signal: str = "auto"


@dataclasses.dataclass(frozen=True)
class OnPolicyOptions:
    """Settings of the on-policy pipeline.

    ``group_size`` is the number of samples a prompt, ``groups_per_batch`` the number of
    prompts an optimiser batch, cut into ``num_substeps`` steps. ``max_tokens`` bounds a
    sample; ``token_budget`` (None: none) bounds all samples of the run. ``kl_discount_factor``
    0 credits a token with its own span alone. ``eval_every`` and ``save_every`` count
    batches; 0 means only at the end. An evaluation runs before the first step, too, and after
    the last. ``api_key`` is the student's service's.

    ``eval_examples`` rows are held out of training for the evaluations (None: a tenth of the data,
    at most 64; of data of one row none, and there is no evaluation). ``advantage_clip`` bounds an
    advantage before ``kl_penalty_coef`` (0: no bound). ``baseline`` ``position`` subtracts the
    batch's mean advantage at each position of the completions. Below ``min_coverage`` (share of
    sampled tokens that teacher and student could be compared on) a run stops. ``tracker`` is where
    ``wandb_project`` is.
    """

    teacher: tuple[TeacherConfig, ...]
    api_key: str | None = None
    api_key_env: str | None = None
    learning_rate: float = 1e-4
    lr_schedule: str = "constant"  #: ``constant``, or ``linear``: down to 0 at the run's end
    groups_per_batch: int = 32
    group_size: int = 4
    max_tokens: int = 1024
    lora_rank: int = 32
    num_substeps: int = 1
    kl_penalty_coef: float = 1.0
    kl_discount_factor: float = 0.0
    loss_fn: str = "importance_sampling"  #: ``importance_sampling``, ``ppo`` or ``cispo``
    compute_post_kl: bool = False
    eval_every: int = 0
    save_every: int = 0
    token_budget: int | None = None
    student_checkpoint_path: str | None = None
    wandb_project: str | None = None
    wandb_name: str | None = None
    seed: int | None = None
    epochs: int = 1
    eval_examples: int | None = None
    advantage_clip: float = 10.0
    baseline: str = "none"  #: ``none`` or ``position``
    min_coverage: float = 0.9
    tracker: str = "wandb"  #: ``wandb`` or ``trackio``


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How rollouts are made.

    ``duplications`` is the number of samples a prompt; ``max_batch_size`` an upper
    bound on requests in flight in one runner (None: the engine decides); ``seed``
    None samples freely; ``upload_every`` publishes to the Hub after so many finished
    rows (0: at the end only).
    """

    parameters: JsonObject = dataclasses.field(default_factory=dict)
    on_policy: bool = False
    on_policy_options: OnPolicyOptions | None = None
    duplications: int = 1
    max_batch_size: int | None = None
    seed: int | None = None
    system_prompt: str | None = None
    upload_every: int = 0


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """``repo_type`` is ``dataset``, or ``model`` for an on-policy job's adapter; where a
    document names none, ``parse_job`` takes the one that fits the job."""

    repo_id: str
    repo_type: str = "dataset"
    private: bool = False
    config_name: str | None = None


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """Where results go. ``local_path`` is on the client; a worker never opens it."""

    mode: str = "return"  #: ``return`` or ``upload_hf``
    local_path: str | None = None
    format: str = "jsonl"  #: ``json``, ``jsonl`` or ``parquet``
    hf: HubConfig | None = None


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """What user functions need: pip requirements and plain (not secret) variables."""

    packages: tuple[str, ...] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """A user function on the wire: ``source`` is Python text that defines ``name``."""

    name: str
    source: str
    kwargs: JsonObject = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SweConfig:
    """A SWE job (root keys in the YAML).

    ``instance_filter`` is a regular expression that an instance's id must match from its
    start; ``max_instances`` None takes all. ``max_retries`` counts fresh attempts of an
    instance after its first, ``n_attempts`` independent runs of each. Budgets are US dollars
    and None is no cap; prices are dollars for one token, None where LiteLLM knows them.
    ``hf_config_name`` None is derived from model, data set and iterations. ``inputs`` are the
    uploaded files when ``dataset`` named a local path: the one of that name is the data set, and
    its rows refer to the others by ``repo_source: input:<sha256>``. ``leave_out`` names a file, an
    uploaded one too, whose lines are the runs that are not to be made although they are selected:
    ``["<instance_id>", <n>]``, ``n`` counting independent runs from 0.
    """

    llm_model: str
    dataset: str = "SWE-bench/SWE-smith"
    split: str = "train"
    max_instances: int | None = None
    instance_filter: str | None = None
    seed: int | None = None
    leave_out: str | None = None
    agent_class: str = "CodeActAgent"
    max_iterations: int = 30
    llm_base_url: str | None = None
    llm_api_key: str | None = None
    llm_api_key_env: str | None = None
    temperature: float | None = None
    condenser: JsonObject | bool | None = None
    workspace: str = "docker"  #: ``docker``, ``bwrap`` or ``local``
    num_workers: int = 1
    n_attempts: int = 1
    max_retries: int = 3
    timeout_seconds: float = 1800.0
    max_budget_per_instance: float | None = None
    max_budget_total: float | None = None
    input_cost_per_token: float | None = None
    output_cost_per_token: float | None = None
    messages_format: str = "text"  #: ``text`` or ``openai``
    evaluate: bool = False
    push_filter: str = "all"  #: ``all``, ``finished`` or ``resolved``
    hf_repo_id: str | None = None
    hf_private: bool = False
    hf_config_name: str | None = None
    eval_output_dir: str = "trajectories"
    inputs: tuple[InputFile, ...] = ()

    @property
    def queue(self) -> Queue:
        return Queue.SWE_AGENT

    @property
    def parallelism(self) -> None:
        """Any number of workers may help: ``num_workers`` counts instances, not runners."""
        return None


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """One job. ``parallelism`` None lets every free worker of the queue help;
    ``shard_size`` is the number of rows in a unit (None: chosen when planned). ``evaluator``
    scores held-out completions of an on-policy job."""

    model: ModelConfig
    source: SourceConfig
    generation: GenerationConfig = GenerationConfig()
    output: OutputConfig = OutputConfig()
    metadata: JsonObject = dataclasses.field(default_factory=dict)
    runtime: RuntimeConfig = RuntimeConfig()
    pre_processor: ProcessorConfig | None = None
    post_processor: ProcessorConfig | None = None
    evaluator: ProcessorConfig | None = None
    tools: tuple[JsonObject, ...] = ()
    parallelism: int | None = None
    shard_size: int | None = None

    @property
    def queue(self) -> Queue:
        return Queue.ONPOLICY_TRAIN if self.generation.on_policy else Queue.OFFLINE_GEN


Job: TypeAlias = JobConfig | SweConfig
"""What ``parse_job`` gives: a job of any queue."""
