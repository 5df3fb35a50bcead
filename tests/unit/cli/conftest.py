from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spider_sdk.transport import RetryPolicy
from tests.support.scripted_server import ScriptedServer

CONFIG = """\
job:
  model:
    provider: openai
    name: m
    base_url: https://models.example/v1
    api_key_env: MODEL_KEY
  source:
    dataset: openai/gsm8k
    field: question
  generation:
    parameters: {temperature: 0.7}
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    """A server at SPIDER_BASE_URL, and an environment in which nothing else is set."""
    for name in ("SPIDER_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SPIDER_CONFIG", str(tmp_path / "user.toml"))
    monkeypatch.setenv("MODEL_KEY", "mk-1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RetryPolicy, "delay", lambda self, attempt, asked=None: 0.001)
    with ScriptedServer() as running:
        monkeypatch.setenv("SPIDER_BASE_URL", running.url)
        yield running


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., str]:
    """Write job.yaml; ``extra`` is appended to its job section."""

    def write(extra: str = "", **replaced: str) -> str:
        text = CONFIG
        for old, new in replaced.items():
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "job.yaml").write_text(text + extra)
        return "job.yaml"

    return write
