"""From config to engine: what is refused, what is needed, what may be shared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.config.model import (
    GenerationConfig,
    JobConfig,
    ModelConfig,
    OnPolicyOptions,
    SourceConfig,
    TeacherConfig,
)
from spider_sdk.errors import AuthError, EngineUnavailable, FatalJobError, NotSupported
from spider_worker.engines import registry, vllm_options
from spider_worker.engines.registry import EnginePolicy, build_engine, check_engine, engine_key

OPEN = EnginePolicy(allow_private_urls=True)
GENERATION = GenerationConfig()


def _model(provider: str = "openai", name: str = "tiny", **more: Any) -> ModelConfig:
    return ModelConfig(provider=provider, name=name, **more)


def test_the_registry_imports_no_engine() -> None:
    """The supervisor asks it for devices and keys, and must stay light."""
    code = (
        "import sys; import spider_worker.engines.registry; "
        "heavy = {'torch', 'transformers', 'vllm', 'aiohttp'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("provider", ["tinker", "local", "nonsense"])
def test_other_providers_are_refused_by_name(provider: str) -> None:
    with pytest.raises(NotSupported, match=provider):
        check_engine(_model(provider), GENERATION, policy=OPEN)


def test_a_student_checkpoint_is_refused_by_name() -> None:
    with pytest.raises(NotSupported, match="student_checkpoint_path"):
        check_engine(_model(student_checkpoint_path="x"), GENERATION, policy=OPEN)


@pytest.mark.parametrize(
    ("provider", "parameters", "said"),
    [
        ("openai", {"n": 2}, "duplications"),
        ("openai", {"stream": True}, "stream"),
        ("transformers", {"temprature": 1}, "did you mean 'temperature'"),
        ("transformers", {"temperature": "hot"}, "temperature"),
        ("transformers", {"top_p": 1.5}, "top_p"),
        ("transformers", {"logprobs": 1}, "logprobs"),
        ("openai", {"top_logprobs": 5}, "kept in no record"),
    ],
)
def test_generation_parameters_are_refused(
    provider: str, parameters: dict[str, Any], said: str
) -> None:
    with pytest.raises(NotSupported, match=said):
        check_engine(_model(provider), GenerationConfig(parameters=parameters), policy=OPEN)


def test_an_endpoint_takes_parameters_that_only_it_knows() -> None:
    check_engine(_model(), GenerationConfig(parameters={"min_p": 0.1, "mirostat": 2}), policy=OPEN)


@pytest.mark.parametrize(
    ("provider", "parameters", "said"),
    [
        ("openai", {"tensor_parallel_size": 4}, "tensor_parallel_size"),
        ("transformers", {"tensor_parallel_size": 4}, "tensor_parallel_size"),
        ("transformers", {"devise": "cpu"}, "did you mean 'device'"),
        ("transformers", {"device": "tpu"}, "device"),
        ("transformers", {"dtype": "int3"}, "dtype"),
        ("transformers", {"trust_remote_code": True}, "SPIDER_ALLOW_REMOTE_CODE"),
        ("vllm", {"trust_remote_code": True}, "SPIDER_ALLOW_REMOTE_CODE"),
    ],
)
def test_engine_arguments_are_refused(provider: str, parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(NotSupported, match=said):
        check_engine(_model(provider, parameters=parameters), GENERATION, policy=OPEN)


@pytest.mark.vllm
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("arguments", "parameters", "said"),
    [
        ({"tensor_paralel_size": 4}, {}, "did you mean 'tensor_parallel_size'"),
        ({"worker_cls": "os.system"}, {}, "worker_cls"),
        ({"data_parallel_size": 2}, {}, "parallelism"),
        ({"tokenizer": "/etc"}, {}, "SPIDER_DATA_ROOTS"),
        ({}, {"temprature": 1}, "did you mean 'temperature'"),
        ({}, {"temperature": -1}, "temperature"),
        ({}, {"n": 2}, "duplications"),
        ({}, {"logprobs": 1}, "log probabilities"),
    ],
)
def test_vllm_options_are_refused(
    arguments: dict[str, Any], parameters: dict[str, Any], said: str
) -> None:
    pytest.importorskip("vllm")
    generation = GenerationConfig(parameters=parameters)
    with pytest.raises(NotSupported, match=said):
        check_engine(_model("vllm", parameters=arguments), generation, policy=OPEN)


def test_models_are_hub_names_or_lie_under_a_data_root(tmp_path: Path) -> None:
    inside = tmp_path / "models" / "one"
    inside.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    policy = EnginePolicy(data_roots=(tmp_path / "models",))
    for name in ("Qwen/Qwen3-0.6B", "gpt2", str(inside), f"{inside}/../one"):
        check_engine(_model("transformers", name), GENERATION, policy=policy)
    for name in ("/etc", str(tmp_path / "elsewhere"), f"{inside}/../../elsewhere", "../elsewhere"):
        with pytest.raises(NotSupported, match="SPIDER_DATA_ROOTS"):
            check_engine(_model("transformers", name), GENERATION, policy=policy)


def test_a_relative_name_means_the_same_wherever_the_runner_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "home" / "models"
    (root / "one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    policy = EnginePolicy(data_roots=(root,))
    for name in ("models/one", "home/models/one", "./one", "one"):
        assert registry.local_model(name, policy, "model.name") == str(root / "one")
    assert registry.local_model("models/two", policy, "model.name") == "models/two"  # of the Hub
    with pytest.raises(NotSupported, match="--data-root"):
        registry.local_model("./models/two", policy, "model.name")


def test_a_link_does_not_lead_out_of_a_data_root(tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    (root / "out").symlink_to("/etc")
    with pytest.raises(NotSupported):
        check_engine(
            _model("transformers", str(root / "out")),
            GENERATION,
            policy=EnginePolicy(data_roots=(root,)),
        )


def test_keys_come_from_the_job_and_not_from_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "the worker's own")
    with pytest.raises(AuthError, match=r"api\.openai\.com needs a key: set OPENAI_API_KEY"):
        build_engine(_model(), GENERATION, {}, policy=OPEN)
    build_engine(_model(), GENERATION, {"OPENAI_API_KEY": "k"}, policy=OPEN)
    build_engine(_model(base_url="http://127.0.0.1:1/v1"), GENERATION, {}, policy=OPEN)
    with pytest.raises(AuthError, match="OPENROUTER_API_KEY"):
        check_engine(_model(base_url="https://openrouter.ai/api/v1"), GENERATION, {}, policy=OPEN)
    with pytest.raises(AuthError, match="MY_KEY"):
        check_engine(_model(api_key_env="MY_KEY"), GENERATION, {}, policy=OPEN)


def test_a_base_url_must_be_one() -> None:
    with pytest.raises(FatalJobError, match="base_url"):
        build_engine(_model(base_url="localhost:8000"), GENERATION, {}, policy=OPEN)


def test_a_local_engine_has_no_endpoint() -> None:
    with pytest.raises(NotSupported, match="base_url"):
        check_engine(_model("transformers", base_url="http://x"), GENERATION, policy=OPEN)


def test_max_batch_size_bounds_what_is_in_flight() -> None:
    generation = GenerationConfig(max_batch_size=8)
    model = _model(base_url="http://127.0.0.1:1/v1")
    engine = build_engine(model, generation, {}, policy=OPEN)
    assert engine.stats().limit == 8
    assert registry.in_flight(engine, model, generation) >= 8
    local = _model("transformers")
    engine = build_engine(local, generation, {}, policy=OPEN)
    assert registry.in_flight(engine, local, generation) == 8


def test_engines_are_shared_by_what_they_load() -> None:
    model = _model("vllm", parameters={"max_model_len": 512, "seed": 1})
    same = _model("vllm", parameters={"seed": 1, "max_model_len": 512})
    key = engine_key(model, GENERATION)
    assert key == engine_key(same, GenerationConfig(parameters={"temperature": 0.1}, seed=3))
    assert key != engine_key(_model("vllm", parameters={"seed": 1}), GENERATION)
    assert key != engine_key(_model("transformers", parameters=model.parameters), GENERATION)
    assert key != engine_key(model, GENERATION, {"HF_TOKEN": "hf_a"})
    assert not registry.outlives_job(_model())
    assert registry.outlives_job(model)


def test_a_gpu_that_is_not_here_is_missed_when_the_job_is_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineUnavailable, match="no such GPU"):
        check_engine(_model("transformers", parameters={"device": "cuda"}), GENERATION, policy=OPEN)


def test_a_key_goes_to_no_server_that_it_was_not_meant_for() -> None:
    env = {"OPENAI_API_KEY": "o", "OPENROUTER_API_KEY": "r", "MINE": "m"}

    def key(**fields: Any) -> str | None:
        model = _model(**fields)
        return registry.api_key(model, registry.base_url_of(model, env), env)

    assert key() == "o"
    assert key(base_url="https://api.openai.com/v1") == "o"
    assert key(base_url="https://openrouter.ai/api/v1") == "r"
    assert key(base_url="https://elsewhere.example/v1") is None
    assert key(base_url="https://elsewhere.example/v1", api_key_env="MINE") == "m"
    # Where the environment gives the address, the key beside it is its own.
    env["OPENAI_BASE_URL"] = "https://elsewhere.example/v1"
    assert key() == "o"
    del env["OPENROUTER_API_KEY"]
    with pytest.raises(AuthError, match="OPENROUTER_API_KEY"):
        key(base_url="https://openrouter.ai/api/v1")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def needed(*args: Any, **options: Any) -> int:
        return registry.devices_needed(JobConfig(_model(*args, **options), SourceConfig("d")))

    monkeypatch.setattr(vllm_options, "is_cpu_build", lambda: False)
    sizes = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}
    assert needed("vllm") == 1
    assert needed("vllm", parameters=sizes) == 8
    assert needed("transformers") == needed("transformers", parameters={"device": "cuda"}) == 1
    assert needed("transformers", parameters={"device": "cpu"}) == 0
    assert needed() == 0
    with pytest.raises(NotSupported, match="tensor_parallel_size"):
        needed("vllm", parameters={"tensor_parallel_size": "four"})
    monkeypatch.setattr(vllm_options, "is_cpu_build", lambda: True)
    assert needed("vllm", parameters=sizes) == 0


@pytest.mark.parametrize(
    ("student", "parameters", "teacher", "count"),
    [
        ("local", {}, {}, 1),
        ("local", {"vllm": {"tensor_parallel_size": 2}}, {}, 2),
        ("local", {"device": "cpu", "vllm": {}}, {"base_url": "http://h/v1"}, 0),
        ("local", {"device": "cpu"}, {"parameters": {"device": "cpu"}}, 0),
        ("tinker", {}, {"provider": "local"}, 1),
        ("local", {"device": "cuda"}, {}, 1),
        ("local", {"device": "cuda"}, {"parameters": {"device": "cuda:1"}}, 2),
        ("vllm", {"device": "cuda", "vllm": {"tensor_parallel_size": 2}}, {"provider": "local"}, 2),
        ("tinker", {}, {}, 0),
        ("tinker", {}, {"provider": "vllm", "parameters": {"tensor_parallel_size": 4}}, 4),
        ("local", {"device": "cuda"}, {"provider": "vllm", "base_url": "http://h:1/v1"}, 1),
    ],
)
def test_devices_of_a_training_run_are_those_of_the_model_that_reaches_furthest(
    monkeypatch: pytest.MonkeyPatch,
    student: str,
    parameters: dict[str, Any],
    teacher: dict[str, Any],
    count: int,
) -> None:
    monkeypatch.setattr(vllm_options, "is_cpu_build", lambda: False)
    options = OnPolicyOptions((TeacherConfig("t", **teacher),))
    job = JobConfig(
        _model(student, parameters=parameters),
        SourceConfig("d"),
        GenerationConfig(on_policy=True, on_policy_options=options),
    )
    assert registry.devices_needed(job) == count
    assert registry.runner_key(job, "j1") != registry.runner_key(job, "j2")


@pytest.mark.parametrize("provider", ["local", "vllm"])
def test_arguments_for_vllm_that_are_none_are_refused_before_a_runner_starts(
    provider: str,
) -> None:
    options = OnPolicyOptions((TeacherConfig("t", base_url="http://h/v1"),))
    job = JobConfig(
        _model(provider, parameters={"vllm": True}),
        SourceConfig("d"),
        GenerationConfig(on_policy=True, on_policy_options=options),
    )
    with pytest.raises(NotSupported, match=r"parameters\.vllm: expected a mapping"):
        registry.devices_needed(job)
