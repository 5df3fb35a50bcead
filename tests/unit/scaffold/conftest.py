from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spider_sdk.transport import RetryPolicy
from tests.support.scripted_server import ScriptedServer
from tests.support.swe_jobs import CONFIG, Jobs


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and an environment in which only MODEL_KEY is set."""
    for name in ("SPIDER_API_KEY", "SPIDER_BASE_URL", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SPIDER_CONFIG", str(tmp_path / "user.toml"))
    monkeypatch.setenv("MODEL_KEY", "mk-1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RetryPolicy, "delay", lambda self, attempt, asked=None: 0.001)
    return tmp_path


@pytest.fixture
def jobs(plain: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """A server at SPIDER_BASE_URL."""
    with ScriptedServer() as server:
        monkeypatch.setenv("SPIDER_BASE_URL", server.url)
        yield Jobs(server)


@pytest.fixture
def config(plain: Path) -> Callable[..., str]:
    """Write swe.yaml, with ``extra`` at its end."""

    def write(extra: str = "") -> str:
        (plain / "swe.yaml").write_text(CONFIG + extra)
        return "swe.yaml"

    return write
