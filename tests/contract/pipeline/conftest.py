"""One job over fakes, over an endpoint and over a model in process, real parts around them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.config.model import (
    GenerationConfig,
    InputFile,
    JobConfig,
    ModelConfig,
    OutputConfig,
    Pricing,
    ProcessorConfig,
    SourceConfig,
)
from spider_worker.pipelines.base import Pipeline
from spider_worker.pipelines.offline_gen.pipeline import OfflineGenPipeline
from spider_worker.pipelines.registry import build_pipeline
from spider_worker.settings import WorkerSettings
from spider_worker.testing import (
    FakeEngine,
    InMemorySource,
    LocalContext,
    LocalStore,
    fake_parts,
)
from tests.support.openai_server import running_server
from tests.support.tiny_model import tiny_model

__all__ = ["World", "tiny_model", "world"]

PROCESSORS = """
def pre(row):
    if row["number"] == 1:
        return None
    if row["number"] == 2:
        raise ValueError("two is refused")
    return {"prompt": "count " + row["question"], "seen": True}

def post(record):
    if record["index"] == 3:
        return None
    if record["index"] == 4:
        raise KeyError("four")
    return {**record, "length": len(record["completion"])}
"""


@dataclasses.dataclass
class World:
    """Where a job runs. ``pipeline`` makes one for a job; ``secrets`` is the job's env."""

    model: ModelConfig
    folder: Path
    build: Callable[[JobConfig], Pipeline]
    inputs: dict[str, Path]
    source: SourceConfig
    secrets: dict[str, str]

    def job(self, *, processors: bool = False, **changes: Any) -> JobConfig:
        def processor(name: str) -> ProcessorConfig | None:
            return ProcessorConfig(name=name, source=PROCESSORS) if processors else None

        return JobConfig(
            model=self.model,
            source=self.source,
            generation=GenerationConfig({"max_tokens": 4}, duplications=2, seed=3),
            pre_processor=processor("pre"),
            post_processor=processor("post"),
            output=OutputConfig(format="parquet"),
            shard_size=3,
            **changes,
        )

    def context(self, job: JobConfig) -> LocalContext:
        return LocalContext(LocalStore(self.folder), job, inputs=self.inputs, secrets=self.secrets)


ROWS = [{"question": f"number {i}", "number": i} for i in range(8)]


@pytest.fixture(params=["fakes", "openai", "transformers"])
def world(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    folder = tmp_path / "job"
    pricing = Pricing(1.0, 2.0)
    if request.param == "fakes":
        yield World(
            ModelConfig("transformers", "fake", pricing=pricing), folder, _over_fakes,
            {}, SourceConfig("memory", field="question"), {},
        )  # fmt: skip
        return
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    source = SourceConfig("rows.jsonl", field="question", inputs=(InputFile(path.name, digest),))
    if request.param == "openai":
        settings = WorkerSettings(allow_private_urls=True, state=tmp_path / "state")
        with running_server() as server:
            model = ModelConfig(
                "openai", "any", base_url=server.base_url, api_key_env="KEY", pricing=pricing
            )
            yield World(
                model, folder, lambda job: build_pipeline(job, settings), {digest: path},
                source, {"KEY": "sk-canary-7"},
            )  # fmt: skip
        return
    tiny: Path = request.getfixturevalue("tiny_model")
    roots = os.pathsep.join([str(tiny.parent)])
    settings = WorkerSettings(data_roots=roots, state=tmp_path / "state")
    yield World(
        ModelConfig("transformers", str(tiny), pricing=pricing), folder,
        lambda job: build_pipeline(job, settings), {digest: path}, source, {},
    )  # fmt: skip


def _over_fakes(job: JobConfig) -> Pipeline:
    names: dict[str, Any] = {}
    exec(PROCESSORS, names)
    parts = fake_parts(InMemorySource(ROWS), FakeEngine(), pre=names["pre"], post=names["post"])
    return OfflineGenPipeline(job, parts)
