"""One Hub emulator and one loading process for all tests here; each test has its own repository."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.utils
import pytest

from tests.support.hub_emulator import USER, WRITE_TOKEN, HubEmulator
from tests.support.hub_loader import HubLoader
from tests.support.tiny_model import tiny_model

__all__ = ["tiny_model"]

_numbers = itertools.count()


@pytest.fixture(scope="session")
def _hub() -> Iterator[HubEmulator]:
    with HubEmulator(page_size=3) as hub:
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def hub(
    _hub: HubEmulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[HubEmulator]:
    """The emulator, without faults and with an empty list of requests. Its pages are short."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.utils.disable_progress_bars()
    _hub.faults.clear()
    _hub.requests.clear()
    yield _hub
    huggingface_hub.utils.enable_progress_bars()


@pytest.fixture(scope="session")
def loader(_hub: HubEmulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubLoader]:
    with HubLoader(_hub.endpoint, tmp_path_factory.mktemp("hf-home"), WRITE_TOKEN) as loader:
        yield loader


@pytest.fixture
def repo_id() -> str:
    return f"{USER}/rollouts-{next(_numbers)}"
