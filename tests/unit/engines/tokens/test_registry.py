"""From a teacher's config to an engine: which one, what it is given, what is refused."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.config import parse_job
from spider_sdk.config.model import JobConfig, TeacherConfig
from spider_sdk.errors import AuthError, EngineUnavailable, FatalJobError, NotSupported
from spider_worker.engines.registry import EnginePolicy
from spider_worker.engines.tokens.openai import OpenAITokenEngine
from spider_worker.engines.tokens.registry import (
    build_teacher,
    check_vllm,
    signals_of,
    teacher_text,
)
from spider_worker.engines.tokens.torch_engine import TorchTokenEngine
from spider_worker.engines.tokens.vllm import VllmTokenEngine
from spider_worker.pipelines.local import LocalContext, LocalStore
from spider_worker.pipelines.onpolicy_train.build import real_parts
from spider_worker.settings import WorkerSettings
from spider_worker.tinker_service.service import HOSTED
from spider_worker.tokens import TokenEngine, TokenEngineInfo

OPEN = EnginePolicy(allow_private_urls=True)
URL = "http://teacher.example/v1"


def build(provider: str = "openai", *, job: str = "local", **config: Any) -> TokenEngine:
    secrets = config.pop("secrets", {})
    policy = config.pop("policy", OPEN)
    teacher = TeacherConfig(name=config.pop("name", "tiny"), provider=provider, **config)
    return build_teacher(teacher, job, secrets, policy=policy)


def test_the_registry_imports_no_engine() -> None:
    code = (
        "import sys; import spider_worker.engines.tokens.registry; "
        "heavy = {'torch', 'transformers', 'vllm', 'aiohttp', 'tinker'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("provider", "base_url", "engine"),
    [
        ("openai", URL, OpenAITokenEngine),
        ("vllm", URL, OpenAITokenEngine),
        ("vllm", None, VllmTokenEngine),
        ("local", None, TorchTokenEngine),
        ("transformers", None, TorchTokenEngine),
    ],
)
def test_a_provider_names_an_engine(provider: str, base_url: str | None, engine: type) -> None:
    """None is the job's."""
    assert type(build(provider, base_url=base_url)) is engine
    assert type(build(None, job=provider, base_url=base_url)) is engine  # type: ignore[arg-type]
    assert type(build(provider, job="nonsense", base_url=base_url)) is engine


@pytest.mark.skipif(importlib.util.find_spec("tinker") is None, reason="tinker is not installed")
def test_tinker_is_one_too() -> None:
    from spider_worker.engines.tokens.tinker import TinkerTokenEngine

    engine = build("tinker", secrets={"TINKER_API_KEY": "tml-0"})
    assert type(engine) is TinkerTokenEngine
    with pytest.raises(NotSupported, match="dtype"):
        build("tinker", secrets={"TINKER_API_KEY": "tml-0"}, parameters={"dtype": "auto"})


@pytest.mark.skipif(importlib.util.find_spec("tinker") is None, reason="tinker is not installed")
@pytest.mark.parametrize(
    ("model", "options", "teacher", "found"),
    [
        ({"base_url": "http://mine"}, {}, {}, ("http://mine", "tml-none")),
        ({}, {"api_key_env": "K"}, {}, (None, "tml-k")),
        ({}, {"api_key": "tml-clear"}, {"provider": "tinker"}, (None, "tml-clear")),
        ({"api_key_env": "K"}, {}, {"base_url": "http://other"}, ("http://other", "tml-none")),
        ({"api_key_env": "K"}, {}, {"api_key_env": "T"}, (None, "tml-t")),
        ({}, {}, {}, (None, "tml-0")),
    ],
)
def test_a_teacher_at_the_students_service(
    model: dict[str, Any],
    options: dict[str, Any],
    teacher: dict[str, Any],
    found: tuple[str | None, str],
    tmp_path: Path,
) -> None:
    """It has the address and the key from there, and a key goes to no other address."""
    document = {
        "model": {"provider": "tinker", "name": "s", **model},
        "source": {"dataset": "d", "field": "f"},
        "generation": {
            "on_policy": True,
            "on_policy_options": {"teacher": {"name": "t", **teacher}, **options},
        },
    }
    job = parse_job(document)
    assert isinstance(job, JobConfig)
    assert job.generation.on_policy_options is not None
    secrets = {"K": "tml-k", "T": "tml-t", "TINKER_API_KEY": "tml-0"}
    ctx = LocalContext(LocalStore(tmp_path), job, document=document, secrets=secrets)
    settings = WorkerSettings(state=tmp_path, allow_private_urls=True)
    made: Any = real_parts(settings).teacher(ctx, job.generation.on_policy_options.teacher[0])
    assert (made._service.url, made._service._key) == (found[0] or HOSTED, found[1])


def test_another_provider_is_refused_by_name() -> None:
    with pytest.raises(NotSupported, match=r"teacher\.provider: 'anthropic' scores nothing"):
        build("anthropic")


@pytest.mark.parametrize("provider", ["local", "vllm"])
@pytest.mark.parametrize("option", ["base_url", "api_key", "api_key_env"])
def test_what_only_an_endpoint_has_is_refused_elsewhere(provider: str, option: str) -> None:
    if (provider, option) == ("vllm", "base_url"):
        return  # that is the endpoint
    with pytest.raises(NotSupported, match=rf"teacher\.{option} belongs to an endpoint"):
        build(provider, **{option: URL})


@pytest.mark.parametrize(
    ("provider", "parameters", "said"),
    [
        ("openai", {"max_retry": 1}, "did you mean 'max_retries'"),
        ("openai", {"dtype": "auto"}, "dtype"),
        ("openai", {"topk": -1}, "topk"),
        ("openai", {"context": "long"}, "context"),
        ("openai", {"max_in_flight": 0}, "max_in_flight"),
        ("openai", {"timeout": "soon"}, "timeout"),
        ("openai", {"extra_body": {"echo": True}}, r"extra_body\.echo"),
        ("local", {"dtyp": "auto"}, "did you mean 'dtype'"),
        ("vllm", {"enable_lora": True}, "enable_lora"),
        ("vllm", {"logprobs_mode": "raw_logits"}, "logprobs_mode"),
        ("vllm", {"download_dir": "/etc"}, "reaches into the worker's files"),
        ("vllm", {"model": "other"}, "model"),
    ],
)
def test_parameters_are_refused_by_name(
    provider: str, parameters: dict[str, Any], said: str
) -> None:
    with pytest.raises(NotSupported, match=rf"teacher\.parameters\..*{said}|{said}"):
        build(provider, base_url=URL if provider == "openai" else None, parameters=parameters)


def test_parameters_of_the_text_go_to_no_engine() -> None:
    own = {"tokenizer": "x/y", "chat_template_kwargs": {"enable_thinking": False}}
    for provider, url in (("openai", URL), ("local", None), ("vllm", None)):
        build(provider, base_url=url, parameters=own)
    # Of a model that is served elsewhere, these can only mean the tokenizer's.
    policy = EnginePolicy(allow_remote_code=True)
    remote = {**own, "revision": "main", "trust_remote_code": True}
    build("openai", base_url=URL, parameters=remote, policy=policy)


@pytest.mark.parametrize(("provider", "url"), [("openai", URL), ("local", None), ("vllm", None)])
def test_code_of_repositories_runs_where_the_operator_allows_it(
    provider: str, url: str | None
) -> None:
    parameters = {"trust_remote_code": True}
    with pytest.raises(NotSupported, match="SPIDER_ALLOW_REMOTE_CODE"):
        build(provider, base_url=url, parameters=parameters)
    allowing = EnginePolicy(allow_remote_code=True)
    build(provider, base_url=url, parameters=parameters, policy=allowing)


def test_a_model_and_what_belongs_to_it_come_from_the_hub_or_a_data_root(tmp_path: Path) -> None:
    (tmp_path / "root" / "tiny").mkdir(parents=True)
    policy = EnginePolicy(data_roots=(tmp_path / "root",))
    for provider in ("local", "vllm"):
        engine = build(provider, name="tiny", policy=policy)
        assert engine.info.name == str(tmp_path / "root" / "tiny")
        with pytest.raises(NotSupported, match=r"teacher\.name"):
            build(provider, name=str(tmp_path), policy=policy)
    for arguments in (
        {"hf_config_path": str(tmp_path)},
        {"speculative_config": {"model": str(tmp_path)}},
    ):
        with pytest.raises(NotSupported, match=r"here\..*is neither a model of the Hub"):
            check_vllm(arguments, policy, "here")
    check_vllm({"generation_config": "vllm", "hf_config_path": "org/name"}, policy, "here")


def test_a_key_comes_with_the_job() -> None:
    with pytest.raises(AuthError, match=r"teacher\.api_key_env names MY_KEY"):
        build(base_url=URL, api_key_env="MY_KEY")
    build(base_url=URL, api_key_env="MY_KEY", secrets={"MY_KEY": "sk-0"})
    build(secrets={"OPENAI_API_KEY": "sk-0"})
    with pytest.raises(AuthError, match="TOGETHER_API_KEY"):
        build(base_url="https://api.together.xyz/v1")


def test_an_address_must_be_one() -> None:
    with pytest.raises(FatalJobError, match=r"teacher\.base_url: expected an http"):
        build(base_url="teacher.example/v1")


def test_a_teachers_text_is_its_own_or_the_one_it_names(tiny_model: Path) -> None:
    policy = EnginePolicy(data_roots=(tiny_model.parent,))
    hello = [{"role": "user", "content": "hello"}]
    named = TeacherConfig(
        name="served", parameters={"tokenizer": str(tiny_model)}, system_prompt="count"
    )
    own = TeacherConfig(name=str(tiny_model))
    with_prompt = teacher_text(named, policy=policy).render(hello)
    assert len(with_prompt) > len(teacher_text(own, policy=policy).render(hello))
    with pytest.raises(EngineUnavailable, match=r"parameters\.tokenizer"):
        teacher_text(TeacherConfig(name=str(tiny_model.parent)), policy=policy)
    bad = TeacherConfig(name=str(tiny_model), parameters={"chat_template_kwargs": ["x"]})
    with pytest.raises(NotSupported, match="chat_template_kwargs"):
        teacher_text(bad, policy=policy)


def test_signals_are_what_an_engine_gives() -> None:
    class Sampled:
        info = TokenEngineInfo("x")

    class Top:
        info = TokenEngineInfo("x", topk=20)

    class Full(Top):
        async def compute_distributions(self) -> None: ...

    assert signals_of(Sampled()) == {"sampled"}  # type: ignore[arg-type]
    assert signals_of(Top()) == {"sampled", "topk"}  # type: ignore[arg-type]
    assert signals_of(Full()) == {"sampled", "topk", "full"}  # type: ignore[arg-type]
