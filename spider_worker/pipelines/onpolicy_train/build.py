"""The real parts of the pipeline, as a worker may use them. What a job does not use is not
imported for it."""

from __future__ import annotations

__all__ = ["real_parts"]

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from spider_sdk.config.model import JobConfig, ProcessorConfig, TeacherConfig
from spider_sdk.config.services import student_service, teacher_service
from spider_sdk.errors import FatalJobError, NotSupported
from spider_worker.engines import registry as engines
from spider_worker.engines.tokens import registry as tokens
from spider_worker.engines.tokens.selftest import check_scorer
from spider_worker.engines.tokens.text import load_text
from spider_worker.engines.vllm_options import is_cpu_build
from spider_worker.pipelines.base import JobContext
from spider_worker.pipelines.onpolicy_train.parts import (
    AdapterRepo,
    ModelText,
    Parts,
    RunTracker,
)
from spider_worker.sandbox.base import Sandbox
from spider_worker.settings import WorkerSettings
from spider_worker.sources.base import Source
from spider_worker.tokens import TokenEngine
from spider_worker.trainers.base import AdapterServer, Trainer

log = logging.getLogger(__name__)

#: Parameters of the trainer's that mean something to vLLM, and what it calls them.
_SHARED: Final = {
    "dtype": "dtype",
    "max_batch": "max_num_seqs",
    "max_model_len": "max_model_len",
    "revision": "revision",
    "trust_remote_code": "trust_remote_code",
}


def real_parts(settings: WorkerSettings) -> Parts:
    policy = engines.EnginePolicy.from_settings(settings)

    def teacher(ctx: JobContext, config: TeacherConfig) -> TokenEngine:
        service = teacher_service(ctx.job, config)
        return tokens.build_teacher(service, ctx.job.model.provider, ctx.secrets, policy=policy)

    def sandbox(job: JobConfig, processor: ProcessorConfig, stage: str) -> Sandbox:
        from spider_worker.sandbox.build import build_sandbox

        output = functools.partial(log.info, "%s prints: %s", stage)
        return build_sandbox(processor, job.runtime, settings, stage=stage, on_output=output)

    return Parts(
        trainer=functools.partial(_trainer, policy),
        checkpoint=functools.partial(_checkpoint, policy),
        student_text=functools.partial(_student_text, policy),
        teacher=teacher,
        teacher_text=lambda _, config: tokens.teacher_text(config, policy=policy),
        signals=tokens.signals_of,
        self_test=check_scorer,
        source=functools.partial(_source, policy),
        sandbox=sandbox,
        tracker=functools.partial(_tracker, policy),
        repo=_repo,
        card=functools.partial(_card, policy),
        draw=_draw,
    )


def _trainer(policy: engines.EnginePolicy, ctx: JobContext, seed: int) -> Trainer:
    """The trainer of ``model.provider``: the Tinker service, or one here whose samples come from
    vLLM (``vllm``), from torch (``transformers``), or from what this worker has (``local``)."""
    model = ctx.job.model
    options = ctx.job.generation.on_policy_options
    assert options is not None
    if model.provider == "tinker":
        from spider_worker.trainers.tinker import TinkerTrainer

        return TinkerTrainer(
            model.name,
            lora_rank=options.lora_rank,
            seed=seed,
            base_url=model.base_url or ctx.secrets.get("TINKER_BASE_URL"),
            api_key=tokens.tinker_key(student_service(ctx.job), ctx.secrets),
            parameters=model.parameters,
            allow_private=policy.allow_private_urls,
        )
    if model.provider not in ("local", "transformers", "vllm"):
        raise NotSupported(
            f"model.provider: {model.provider!r} trains nothing; use tinker, local, transformers or"
            " vllm"
        )
    if model.base_url:
        raise NotSupported(
            f"model.base_url belongs to the Tinker service; provider {model.provider} has none"
        )
    if model.parameters.get("trust_remote_code") and not policy.allow_remote_code:
        raise NotSupported(
            "model.parameters.trust_remote_code: this worker does not run code of model"
            " repositories. Its operator can allow it with SPIDER_ALLOW_REMOTE_CODE=true."
        )
    from spider_worker.trainers.local import LocalTrainer

    parameters = dict(model.parameters)
    name = engines.local_model(model.name, policy, "model.name")
    server = _adapter_server(policy, model.provider, name, options.lora_rank, parameters)
    return LocalTrainer(
        name, lora_rank=options.lora_rank, parameters=parameters, seed=seed, server=server
    )


def _checkpoint(policy: engines.EnginePolicy, ctx: JobContext, name: str) -> str:
    if ctx.job.model.provider == "tinker":
        return name  # the service's own names; the trainer says what else it takes
    return engines.local_model(name, policy, "student_checkpoint_path")


def _adapter_server(
    policy: engines.EnginePolicy, provider: str, name: str, rank: int, parameters: dict[str, Any]
) -> AdapterServer | None:
    """vLLM for the student's samples; None for torch's. ``parameters.vllm``, which is taken out,
    holds its own arguments; what else ``parameters`` says holds for it as well."""
    arguments: Mapping[str, Any] = parameters.pop("vllm", None) or {}
    where = "model.parameters.vllm"
    why_not = _why_no_vllm(provider, name, parameters)
    if why_not is not None:
        if arguments:
            raise NotSupported(f"{where}: torch samples from this student: {why_not}")
        return None
    if not isinstance(arguments, Mapping):
        raise NotSupported(f"{where}: expected a mapping of vLLM's arguments, not {arguments!r}")
    from spider_worker.engines.tokens.vllm import VllmAdapterServer

    shared = {its: parameters[ours] for ours, its in _SHARED.items() if ours in parameters}
    arguments = {**shared, **arguments}
    tokens.check_vllm(arguments, policy, where)
    server = VllmAdapterServer(name, lora_rank=rank, arguments=arguments, where=where)
    return server if provider == "vllm" else _Unasked(server)


def _why_no_vllm(provider: str, name: str, parameters: Mapping[str, Any]) -> str | None:
    """Why torch samples from the student ``name``, and what to do about it; None where vLLM does.
    Of provider ``local`` it does on a GPU, in the precision that is trained: on the CPU torch is
    the one whose samples are the same after a resume, and with small models no slower."""
    from spider_worker.torch_models.device import choose_device

    if provider == "vllm":
        return None
    if provider == "transformers":
        return "provider transformers asks for that. Set model.provider to vllm, or remove it"
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed on this worker. Remove it, or use a worker that has vLLM"
    if is_cpu_build() or choose_device(parameters, where="model.parameters") == "cpu":
        return "it is on the CPU. Set model.provider to vllm to have vLLM sample, or remove it"
    if _precision(name, parameters) == "float32":
        return (
            "it is trained in float32, in which vLLM serves no adapters on a GPU. Set"
            " model.parameters.dtype to bfloat16, or remove it"
        )
    return None


def _precision(name: str, parameters: Mapping[str, Any]) -> str:
    """The dtype in which the model is loaded on a GPU; a config that names none is of the time when
    all were float32."""
    asked = str(parameters.get("dtype", "auto"))
    if asked != "auto":
        return asked
    from transformers import AutoConfig

    loading = {
        key: parameters[key] for key in ("revision", "trust_remote_code") if key in parameters
    }
    try:
        dtype = AutoConfig.from_pretrained(name, **loading).get_text_config().dtype
    except (OSError, ValueError):
        return "auto"  # the trainer says what is wrong with it
    return "float32" if dtype is None else str(dtype).removeprefix("torch.")


class _Unasked:
    """An AdapterServer that the job did not ask for by name: its errors say how to do without."""

    def __init__(self, server: AdapterServer) -> None:
        self._server = server
        self.name = server.name

    async def start(self) -> None:
        with _said_how_to_do_without():
            await self._server.start()

    async def serve(self, adapter: Path) -> TokenEngine:
        with _said_how_to_do_without():
            return await self._server.serve(adapter)

    async def close(self) -> None:
        await self._server.close()


@contextlib.contextmanager
def _said_how_to_do_without() -> Iterator[None]:
    try:
        yield
    except FatalJobError as error:
        error.add_note(
            "to have torch sample from the student, set model.provider to transformers (without"
            " model.parameters.vllm)"
        )
        raise


def _student_text(policy: engines.EnginePolicy, ctx: JobContext, name: str) -> ModelText:
    model = ctx.job.model
    trusted = policy.allow_remote_code and bool(model.parameters.get("trust_remote_code"))
    return load_text(
        engines.local_model(name, policy, "the student's tokenizer"),
        revision=model.parameters.get("revision"),
        trust_remote_code=trusted,
        arguments=ctx.job.generation.parameters.get("chat_template_kwargs"),
    )


def _source(policy: engines.EnginePolicy, ctx: JobContext, seed: int) -> Source:
    from spider_worker.sources.build import build_source

    config = ctx.job.source
    paths = {file.name: ctx.input_path(file.sha256) for file in config.inputs}
    token = ctx.secrets.get("HF_TOKEN")
    return build_source(config, paths, seed, token, data_roots=policy.data_roots)


def _tracker(policy: engines.EnginePolicy, ctx: JobContext, step: int | None) -> RunTracker | None:
    from spider_worker.trackers.build import build_tracker

    return build_tracker(ctx, step, allow_private=policy.allow_private_urls)


def _repo(ctx: JobContext) -> AdapterRepo:
    from spider_worker.sinks.adapter import AdapterPublisher

    return AdapterPublisher(ctx.job, token=ctx.secrets.get("HF_TOKEN"), work_dir=ctx.scratch)


def _card(policy: engines.EnginePolicy, ctx: JobContext, facts: Mapping[str, Any]) -> str:
    from spider_worker.sinks.adapter_card import adapter_card

    model = ctx.job.model
    served = model.provider == "tinker"  # by names of its own, which are those of the Hub
    base = model.name if served else engines.local_model(model.name, policy, "model.name")
    return adapter_card(ctx.job, {**facts, "base_model": base})


def _draw(metrics: Path, png: Path, title: str) -> None:
    from spider_worker.trackers.curves import draw_curves

    draw_curves(metrics, png, title=title)
