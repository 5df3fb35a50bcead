"""From a job's config to an engine, importing only the one that is asked for."""

from __future__ import annotations

__all__ = [
    "EnginePolicy",
    "api_key",
    "base_url_of",
    "build_engine",
    "check_engine",
    "devices_needed",
    "engine_key",
    "in_flight",
    "local_model",
    "outlives_job",
    "runner_key",
]

import dataclasses
import hashlib
import json
import os
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from spider_sdk.config.model import GenerationConfig, JobConfig, ModelConfig
from spider_sdk.config.services import KEY_OF_HOST
from spider_sdk.errors import AuthError, FatalJobError, NotSupported
from spider_sdk.settings import load
from spider_worker.engines import vllm_options
from spider_worker.engines.base import Engine
from spider_worker.settings import WorkerSettings
from spider_worker.torch_models.device import choose_device, devices_for

PROVIDERS: Final = ("openai", "transformers", "vllm")
_TORCH: Final = ("local", "transformers")
OPENAI_BASE_URL: Final = "https://api.openai.com/v1"

_HUB_ID: Final = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclasses.dataclass(frozen=True)
class EnginePolicy:
    """What this worker lets a job's engine do. ``data_roots`` are the folders from which a
    job may name a model."""

    allow_private_urls: bool = False
    allow_remote_code: bool = False
    data_roots: tuple[Path, ...] = ()

    @classmethod
    def from_settings(cls, settings: WorkerSettings | None = None) -> EnginePolicy:
        settings = settings or load(WorkerSettings)
        roots = (settings.data_roots or "").split(os.pathsep)
        return cls(
            allow_private_urls=settings.allow_private_urls,
            allow_remote_code=settings.allow_remote_code,
            data_roots=tuple(Path(root).expanduser().resolve() for root in roots if root),
        )


def check_engine(
    model: ModelConfig,
    generation: GenerationConfig,
    secrets: Mapping[str, str] | None = None,
    *,
    policy: EnginePolicy | None = None,
) -> None:
    """Refuse what cannot work, before anything is loaded or sent. ``secrets`` None: not known
    here, so that a missing key is no matter; ``policy`` None: as the worker's settings say.

    Raises NotSupported by option, EngineUnavailable if a package is missing, AuthError if a
    key is. For vllm this imports the package (seconds), to know its options.
    """
    policy = policy or EnginePolicy.from_settings()
    if model.provider not in PROVIDERS:
        raise NotSupported(
            f"model.provider: {model.provider!r} does not generate off-policy data here; "
            f"use one of {', '.join(PROVIDERS)}."
        )
    if model.student_checkpoint_path:
        raise NotSupported(
            "model.student_checkpoint_path: this version generates with model.name as it is; "
            "merge the checkpoint into a model and name that."
        )
    params = _sampling(generation)
    if model.provider == "openai":
        from spider_worker.engines import openai

        openai.check_parameters(model.parameters)
        openai.check_sampling(params)
        if secrets is not None:
            api_key(model, base_url_of(model, secrets), secrets)
        return
    for name, value in (
        ("base_url", model.base_url),
        ("api_key", model.api_key),
        ("api_key_env", model.api_key_env),
    ):
        if value:
            raise NotSupported(f"model.{name} belongs to an endpoint; {model.provider} has none.")
    if model.parameters.get("trust_remote_code") and not policy.allow_remote_code:
        raise NotSupported(
            "model.parameters.trust_remote_code: this worker does not run code of model "
            "repositories. Its operator can allow it with SPIDER_ALLOW_REMOTE_CODE=true."
        )
    local_model(model.name, policy, "model.name")
    if model.provider == "vllm":
        vllm_options.check_engine_arguments(model.parameters)
        vllm_options.check_sampling(params)
        vllm_options.check_platform()
        for name, value in vllm_options.paths_in(model.parameters):
            if value not in ("auto", "vllm"):
                local_model(value, policy, f"model.parameters.{name}")
    else:
        from spider_worker.engines import sampling, transformers

        transformers.check_parameters(model.parameters)
        sampling.check_sampling(params)
        choose_device(model.parameters, where="model.parameters")


def build_engine(
    model: ModelConfig,
    generation: GenerationConfig,
    secrets: Mapping[str, str],
    *,
    policy: EnginePolicy | None = None,
) -> Engine:
    """An engine that has not started. ``secrets`` is the job's ``env``: an endpoint's key comes
    from there and never from the worker's own environment, which is not the job's to spend.

    Raises what ``check_engine`` raises.
    """
    policy = policy or EnginePolicy.from_settings()
    check_engine(model, generation, secrets, policy=policy)
    if model.provider == "openai":
        from spider_worker.engines.openai import DEFAULT_IN_FLIGHT, OpenAIEngine

        base_url = base_url_of(model, secrets)
        return OpenAIEngine(
            model.name,
            base_url=base_url,
            api_key=api_key(model, base_url, secrets),
            parameters=model.parameters,
            max_in_flight=generation.max_batch_size or DEFAULT_IN_FLIGHT,
            allow_private=policy.allow_private_urls,
        )
    name = local_model(model.name, policy, "model.name")
    if model.provider == "vllm":
        from spider_worker.engines.vllm import VllmEngine

        return VllmEngine(name, arguments=model.parameters)
    from spider_worker.engines.transformers import DEFAULT_BATCH, TransformersEngine

    batch = min(generation.max_batch_size or DEFAULT_BATCH, 4 * DEFAULT_BATCH)
    return TransformersEngine(name, parameters=model.parameters, max_batch=batch)


def engine_key(
    model: ModelConfig, generation: GenerationConfig, secrets: Mapping[str, str] | None = None
) -> str:
    """Equal for configs that the same engine can serve: a runner keeps engines under it.

    Generation parameters are not part of it, except the batch bound where an engine is built
    with it. ``secrets`` add the Hub token's hash, so that a gated model that one owner may
    read does not serve another.
    """
    token = (secrets or {}).get("HF_TOKEN", "")
    parts: dict[str, Any] = {
        "provider": model.provider,
        "name": model.name,
        "parameters": model.parameters,
        "hub_token": hashlib.sha256(token.encode()).hexdigest() if token else "",
    }
    if model.provider != "vllm":
        parts["max_batch_size"] = generation.max_batch_size
    if model.provider == "openai":
        parts |= {"base_url": model.base_url, "api_key_env": model.api_key_env}
    text = json.dumps(parts, sort_keys=True, default=dict)
    return f"engine-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def outlives_job(model: ModelConfig) -> bool:
    """Whether the next job may use this job's engine: a loaded model, yes; a client that
    holds one job's key, no."""
    return model.provider != "openai"


def in_flight(engine: Engine, model: ModelConfig, generation: GenerationConfig) -> int:
    """How many ``complete`` calls to keep open on a started engine.

    The openai engine enforces ``generation.max_batch_size`` itself and wants more calls than
    that, because rows waiting for a retry are not in flight.
    """
    if model.provider == "openai" or generation.max_batch_size is None:
        return engine.info.capacity
    return min(engine.info.capacity, generation.max_batch_size)


def runner_key(job: JobConfig, job_id: str, secrets: Mapping[str, str] | None = None) -> str:
    """Equal for jobs that one runner can serve in turn. A training run keeps nothing that another
    could use, and is sized for its own teachers, so its runner serves no other job."""
    if job.generation.on_policy:
        return f"job-{job_id}"
    return engine_key(job.model, job.generation, secrets)


def devices_needed(job: JobConfig) -> int:
    """Accelerators that a runner of this job needs. Imports nothing heavy.

    The models of a training run share the runner's devices, which each counts from 0, so the one
    that reaches furthest decides. Raises NotSupported if the sizes are no whole numbers.
    """
    options = job.generation.on_policy_options
    if not job.generation.on_policy or options is None:
        return _engine_devices(job.model.provider, job.model.parameters, "model.parameters")
    student = job.model
    needs = [0]
    if student.provider in (*_TORCH, "vllm"):
        needs.append(devices_for(student.parameters))
    # A student of provider local is sampled by vLLM too, where it is on a GPU.
    if student.provider == "vllm" or (student.provider == "local" and needs[-1]):
        where, arguments = "model.parameters.vllm", student.parameters.get("vllm") or {}
        if not isinstance(arguments, Mapping):
            raise NotSupported(
                f"{where}: expected a mapping of vLLM's arguments, not {arguments!r}"
            )
        needs.append(_vllm_devices(arguments, where))
    for teacher in options.teacher:
        if teacher.base_url is None:
            provider = teacher.provider or student.provider
            needs.append(_engine_devices(provider, teacher.parameters, "teacher.parameters"))
    return max(needs)


def _engine_devices(provider: str, parameters: Mapping[str, Any], where: str) -> int:
    if provider == "vllm":
        return _vllm_devices(parameters, where)
    return devices_for(parameters) if provider in _TORCH else 0


def _vllm_devices(parameters: Mapping[str, Any], where: str) -> int:
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        value = parameters.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise NotSupported(f"{where}.{name}: expected a whole number, not {value!r}.")
    return vllm_options.devices(parameters)


def _sampling(generation: GenerationConfig) -> dict[str, Any]:
    seed = {} if generation.seed is None else {"seed": generation.seed}
    return {**seed, **generation.parameters}


def base_url_of(model: ModelConfig, secrets: Mapping[str, str], *, where: str = "model") -> str:
    named = secrets.get("OPENAI_BASE_URL") or os.environ.get("OPENAI_BASE_URL")
    url = model.base_url or named or OPENAI_BASE_URL
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FatalJobError(f"{where}.base_url: expected an http or https URL, not {url!r}.")
    return url


def api_key(
    model: ModelConfig, base_url: str, secrets: Mapping[str, str], *, where: str = "model"
) -> str | None:
    if model.api_key_env:
        key = secrets.get(model.api_key_env)
        if not key:
            raise AuthError(
                f"{where}.api_key_env names {model.api_key_env}, which did not come with the job. "
                "Set it where the job is submitted."
            )
        return key
    host = urllib.parse.urlsplit(base_url).hostname or ""
    # A server that is none of the known ones gets no key that was not named for it, unless its
    # address came with the environment as the key did.
    usual = KEY_OF_HOST.get(host) or (None if model.base_url else "OPENAI_API_KEY")
    key = model.api_key or (secrets.get(usual) if usual else None)
    if not key and host in KEY_OF_HOST:
        raise AuthError(f"{host} needs a key: set {usual} where the job is submitted.")
    return key


def local_model(name: str, policy: EnginePolicy, where: str) -> str:
    """The folder that ``name`` means under one of the worker's data roots, else ``name`` itself
    if it is a Hub id: a job opens no other path.

    A runner stands in a folder of its own, so a relative name is looked up in each root, and
    from the folders above it: ``models/tiny`` is found in the root ``/home/ada/models`` as
    ``tiny`` is.
    """
    here = Path(name).expanduser()
    candidates = [here]
    if not here.is_absolute():
        candidates += [
            above / name for root in policy.data_roots for above in (root, *root.parents)
        ]
    for candidate in candidates:
        resolved = candidate.resolve()
        if resolved.is_dir() and any(resolved.is_relative_to(r) for r in policy.data_roots):
            return str(resolved)
    if _HUB_ID.fullmatch(name) and not here.exists():
        return name
    raise NotSupported(
        f"{where}: {name!r} is neither a model of the Hub nor a folder that this worker lets jobs "
        "name (its operator can, with SPIDER_DATA_ROOTS or `spider up --data-root FOLDER`)."
    )
