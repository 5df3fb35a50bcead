"""What samples from a student that is trained on this worker."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spider_sdk.config import AppConfig, parse_job
from spider_sdk.config.model import JobConfig
from spider_sdk.errors import EngineUnavailable, NotSupported
from spider_worker.engines.tokens.vllm import VllmAdapterServer
from spider_worker.pipelines.onpolicy_train import build
from spider_worker.settings import WorkerSettings
from tests.support.distil import Models, make_models, training_job

HALF = {"dtype": "bfloat16"}


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A worker of the parameter's GPUs and of the build of vLLM that it names, if any."""
    gpus, vllm = request.param
    real = importlib.util.find_spec

    def find(name: str, *more: Any) -> Any:
        return (object() if vllm else None) if name == "vllm" else real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(build, "is_cpu_build", lambda: vllm == "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


def trainer(models: Models, state: Path, provider: str, **parameters: Any) -> Any:
    job = parse_job(
        training_job(models, model={"provider": provider, "parameters": parameters or {}})
    )
    assert isinstance(job, JobConfig)
    settings = WorkerSettings(data_roots=str(models.root), state=state)
    ctx: Any = SimpleNamespace(job=job, secrets={})
    return build.real_parts(settings).trainer(ctx, 1)


@pytest.mark.parametrize(
    ("worker", "provider", "parameters", "found"),
    [
        ((1, "gpu"), "local", HALF, "vllm"),
        ((1, "gpu"), "local", {**HALF, "vllm": {"enforce_eager": True}}, "vllm"),
        ((1, "gpu"), "local", {**HALF, "device": "cpu"}, "torch"),
        ((1, "gpu"), "local", {}, "vllm"),  # as which the models are stored
        ((1, "gpu"), "local", {"dtype": "float32"}, "torch"),
        ((1, "gpu"), "transformers", {}, "torch"),
        ((1, None), "local", HALF, "torch"),
        ((0, "gpu"), "local", HALF, "torch"),
        ((0, "cpu"), "local", HALF, "torch"),
        ((0, "cpu"), "vllm", {}, "vllm"),
    ],
    indirect=["worker"],
)
@pytest.mark.usefixtures("worker")
def test_what_samples(
    models: Models, tmp_path: Path, provider: str, parameters: dict[str, Any], found: str
) -> None:
    assert trainer(models, tmp_path, provider, **parameters).info.sampler == found


@pytest.mark.parametrize("worker", [(1, "gpu")], indirect=True)
@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("stored", ["float32", None])
def test_a_student_in_full_precision_is_sampled_as_it_is_trained(
    tmp_path: Path, stored: str | None
) -> None:
    """vLLM serves no adapters in float32 on a GPU."""
    models = make_models(tmp_path / "models")
    config = json.loads((models.student / "config.json").read_text())
    (models.student / "config.json").write_text(json.dumps({**config, "dtype": stored}))
    assert trainer(models, tmp_path, "local").info.sampler == "torch"
    assert trainer(models, tmp_path, "local", **HALF).info.sampler == "vllm"
    with pytest.raises(NotSupported, match=r"parameters\.vllm: .*float32.*dtype to bfloat16"):
        trainer(models, tmp_path, "local", vllm={"enforce_eager": True})


@pytest.mark.parametrize("worker", [(0, "cpu")], indirect=True)
@pytest.mark.usefixtures("worker")
def test_vllm_is_told_what_holds_for_the_student(models: Models, tmp_path: Path) -> None:
    given = {"dtype": "float32", "max_batch": 7, "lora_alpha": 8, "vllm": {"dtype": "bfloat16"}}
    server = trainer(models, tmp_path, "vllm", **given)._server
    assert server._process._setup.arguments == {"dtype": "bfloat16", "max_num_seqs": 7}


@pytest.mark.parametrize("worker", [(1, "gpu")], indirect=True)
@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(("provider", "hinted"), [("local", True), ("vllm", False)])
def test_a_vllm_that_nobody_asked_for_says_how_to_do_without(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: str, hinted: bool
) -> None:
    async def fail(_: Any, *given: Any) -> None:
        raise EngineUnavailable("no such architecture")

    monkeypatch.setattr(VllmAdapterServer, "start", fail)
    monkeypatch.setattr(VllmAdapterServer, "serve", fail)
    server = trainer(models, tmp_path, provider, **HALF)._server
    for call in (server.start(), server.serve(tmp_path)):
        with pytest.raises(EngineUnavailable, match="no such architecture") as caught:
            asyncio.run(call)
        assert ("model.provider to transformers" in caught.value.message) is hinted
    asyncio.run(server.close())


@pytest.mark.parametrize("worker", [(0, "gpu")], indirect=True)
@pytest.mark.usefixtures("worker")
def test_a_device_that_is_none_is_called_so_whatever_samples(
    models: Models, tmp_path: Path
) -> None:
    with pytest.raises(NotSupported, match=r"device: expected auto, cpu, cuda or cuda:N"):
        trainer(models, tmp_path, "local", device="gpu")


@pytest.mark.parametrize(
    ("worker", "provider", "why"),
    [
        ((1, None), "local", "vLLM is not installed on this worker"),
        ((0, "gpu"), "local", "on the CPU. Set model.provider to vllm"),
        ((1, "cpu"), "local", "on the CPU. Set model.provider to vllm"),
        ((1, "gpu"), "transformers", "asks for that. Set model.provider to vllm"),
    ],
    indirect=["worker"],
)
@pytest.mark.usefixtures("worker")
def test_arguments_for_a_vllm_that_does_not_sample_are_refused(
    models: Models, tmp_path: Path, provider: str, why: str
) -> None:
    with pytest.raises(NotSupported, match=rf"model\.parameters\.vllm: torch samples .*{why}"):
        trainer(models, tmp_path, provider, vllm={"enforce_eager": True})


@pytest.mark.parametrize(
    ("worker", "provider", "sampler"),
    [
        ((0, None), "local", "torch"),
        ((0, None), "transformers", "torch"),
        ((0, "cpu"), "vllm", "vllm"),
        ((0, None), "tinker", "tinker"),
    ],
    indirect=["worker"],
)
@pytest.mark.usefixtures("worker")
def test_the_demos_file_is_another_providers_with_one_word_changed(
    tmp_path: Path, provider: str, sampler: str
) -> None:
    config = Path(__file__).parents[3] / "config/demo/distil.yaml"
    job = AppConfig.load(config, {"job.model.provider": provider}).job
    assert isinstance(job, JobConfig)
    settings = WorkerSettings(data_roots=str(config.parent), state=tmp_path)
    ctx: Any = SimpleNamespace(job=job, secrets={"TINKER_API_KEY": "tml-1"})
    assert build.real_parts(settings).trainer(ctx, 1).info.sampler == sampler
