"""From a teacher's config to a token engine, importing only the one that is asked for."""

from __future__ import annotations

__all__ = ["build_teacher", "check_vllm", "signals_of", "teacher_text", "tinker_key"]

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from spider_sdk.config.model import ModelConfig, TeacherConfig
from spider_sdk.config.services import usual_key
from spider_sdk.errors import NotSupported
from spider_worker.engines import vllm_options
from spider_worker.engines.registry import EnginePolicy, api_key, base_url_of, local_model
from spider_worker.engines.tokens.text import TokenizerText, load_text
from spider_worker.tokens import TokenEngine

#: Parameters that say how the teacher reads, and go to no engine.
_TEXT: Final = ("chat_template_kwargs", "tokenizer")
#: Where the model is served elsewhere, these say it of the tokenizer alone.
_REMOTE_TEXT: Final = (*_TEXT, "revision", "trust_remote_code")


def build_teacher(
    teacher: TeacherConfig, provider: str, secrets: Mapping[str, str], *, policy: EnginePolicy
) -> TokenEngine:
    """A teacher's engine that has not started. ``provider`` is the job's, for a teacher that
    names none; what it has from the student's service (``teacher_service``) it has by now.
    ``secrets`` is the job's ``env``.

    Raises NotSupported, AuthError, EngineUnavailable, FatalJobError.
    """
    provider = teacher.provider or provider
    where = "teacher.parameters"
    _check_remote_code(teacher.parameters, policy, where)
    if provider == "tinker":
        from spider_worker.engines.tokens.tinker import TinkerTokenEngine

        _refuse_all(_without(teacher.parameters, _REMOTE_TEXT), where, "the Tinker service")
        return TinkerTokenEngine(
            teacher.name,
            base_url=teacher.base_url or secrets.get("TINKER_BASE_URL"),
            api_key=tinker_key(_as_model(teacher, provider), secrets, where="teacher"),
            allow_private=policy.allow_private_urls,
        )
    if provider == "openai" or (provider == "vllm" and teacher.base_url):
        from spider_worker.engines.tokens.openai import OpenAITokenEngine

        model = _as_model(teacher, provider)
        url = base_url_of(model, secrets, where="teacher")
        return OpenAITokenEngine(
            teacher.name,
            base_url=url,
            api_key=api_key(model, url, secrets, where="teacher"),
            parameters=_without(teacher.parameters, _REMOTE_TEXT),
            allow_private=policy.allow_private_urls,
        )
    for option in ("base_url", "api_key", "api_key_env"):
        if getattr(teacher, option):
            raise NotSupported(f"teacher.{option} belongs to an endpoint; {provider} has none.")
    parameters = _without(teacher.parameters, _TEXT)
    name = local_model(teacher.name, policy, "teacher.name")
    if provider == "vllm":
        from spider_worker.engines.tokens.vllm import VllmTokenEngine

        check_vllm(parameters, policy, where)
        return VllmTokenEngine(name, arguments=parameters, where=where)
    if provider in ("local", "transformers"):
        from spider_worker.engines.tokens.torch_engine import TorchTokenEngine

        return TorchTokenEngine(name, parameters=parameters, where=where)
    raise NotSupported(
        f"teacher.provider: {provider!r} scores nothing here; use tinker, vllm, openai,"
        " transformers or local"
    )


def check_vllm(arguments: Mapping[str, Any], policy: EnginePolicy, where: str) -> None:
    """Raises NotSupported for code or folders that this worker does not let a job name among
    vLLM's ``arguments``, which stand at ``where``."""
    _check_remote_code(arguments, policy, where)
    for name, value in vllm_options.paths_in(arguments):
        if value not in ("auto", "vllm"):
            local_model(value, policy, f"{where}.{name}")


def teacher_text(teacher: TeacherConfig, *, policy: EnginePolicy) -> TokenizerText:
    """The teacher's tokenizer and template. Blocking; raises as ``load_text``."""
    named = teacher.parameters.get("tokenizer", teacher.name)
    arguments = teacher.parameters.get("chat_template_kwargs") or {}
    if not isinstance(arguments, Mapping):
        raise NotSupported(
            f"teacher.parameters.chat_template_kwargs: expected a mapping, not {arguments!r}."
        )
    name = local_model(str(named), policy, "teacher.parameters.tokenizer")
    return load_text(
        name,
        revision=teacher.parameters.get("revision"),
        trust_remote_code=policy.allow_remote_code
        and bool(teacher.parameters.get("trust_remote_code")),
        arguments=arguments,
        system_prompt=teacher.system_prompt,
    )


def tinker_key(
    service: ModelConfig, secrets: Mapping[str, str], *, where: str = "model"
) -> str | None:
    """The key for a Tinker service, None for a server that has none named for it. Raises
    AuthError where the named one did not come along."""
    if service.api_key_env:
        return api_key(service, service.base_url or "", secrets, where=where)
    usual = usual_key("tinker", service.base_url)
    return service.api_key or (secrets.get(usual) if usual else None)


def signals_of(engine: TokenEngine) -> frozenset[str]:
    """What a started engine gives of ``sampled``, ``topk`` and ``full``."""
    found = {"sampled"}
    if engine.info.topk:
        found.add("topk")
    if hasattr(engine, "compute_distributions"):
        found.add("full")
    return frozenset(found)


def _check_remote_code(parameters: Mapping[str, Any], policy: EnginePolicy, where: str) -> None:
    if parameters.get("trust_remote_code") and not policy.allow_remote_code:
        raise NotSupported(
            f"{where}.trust_remote_code: this worker does not run code of model repositories. Its"
            " operator can allow it with SPIDER_ALLOW_REMOTE_CODE=true."
        )


def _without(parameters: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name not in names}


def _as_model(teacher: TeacherConfig, provider: str) -> ModelConfig:
    return ModelConfig(
        provider=provider,
        name=teacher.name,
        base_url=teacher.base_url,
        api_key=teacher.api_key,
        api_key_env=teacher.api_key_env,
    )


def _refuse_all(parameters: Mapping[str, Any], where: str, what: str) -> None:
    for name in parameters:
        near = difflib.get_close_matches(name, _TEXT, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise NotSupported(f"{where}.{name}: {what} has no such option{hint}.")
