"""Engines of every kind, started once a session on a loop of their own."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from spider_worker.engines.base import Engine
from tests.support.openai_server import ScriptedServer, running_server
from tests.support.tiny_model import tiny_model

__all__ = ["tiny_model"]

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]

HAS_VLLM = importlib.util.find_spec("vllm") is not None
KINDS = [
    "fake",
    "openai",
    "transformers",
    pytest.param(
        "vllm",
        marks=[
            pytest.mark.vllm,
            pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed"),
            # vLLM and what it imports warn of their own deprecations.
            pytest.mark.filterwarnings("default"),
        ],
    ),
]


@pytest.fixture(scope="session")
def run() -> Iterator[Run[Any]]:
    """Runs a coroutine on one loop that lives as long as the session's engines."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="engines", daemon=True)
    thread.start()
    yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(120)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with running_server() as scripted:
        yield scripted


@pytest.fixture(scope="session")
def fake_engine(run: Run[Any]) -> Iterator[Engine]:
    from spider_worker.testing import FakeEngine

    engine = FakeEngine(latency=0.001)
    run(engine.start())
    yield engine
    run(engine.close())


@pytest.fixture(scope="session")
def openai_engine(run: Run[Any]) -> Iterator[Engine]:
    from spider_worker.engines.openai import OpenAIEngine

    with running_server() as scripted:
        engine = OpenAIEngine("tiny", base_url=scripted.base_url, max_in_flight=64)
        run(engine.start())
        yield engine
        run(engine.close())


@pytest.fixture(scope="session")
def transformers_engine(run: Run[Any], tiny_model: Path) -> Iterator[Engine]:
    from spider_worker.engines.transformers import TransformersEngine

    engine = TransformersEngine(str(tiny_model))
    run(engine.start())
    yield engine
    run(engine.close())


@contextlib.contextmanager
def without_flask() -> Iterator[None]:
    """Hide every module that holds one of Flask's proxies while vllm starts: it looks at all
    attributes of all modules, and the proxies refuse to be looked at outside of a request. A
    runner never imports Flask; a test process may have."""
    proxy = sys.modules["werkzeug.local"].LocalProxy if "werkzeug.local" in sys.modules else None
    hidden = {
        name: module
        for name, module in list(sys.modules.items())
        if proxy and any(type(value) is proxy for value in vars(module).values())
    }
    for name in hidden:
        del sys.modules[name]
    try:
        yield
    finally:
        sys.modules.update(hidden)


@pytest.fixture(scope="session")
def vllm_engine(run: Run[Any], tiny_model: Path) -> Iterator[Engine]:
    from spider_worker.engines.vllm import VllmEngine

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    arguments = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 32}
    engine = VllmEngine(str(tiny_model), arguments=arguments)
    with without_flask():
        run(engine.start())
    yield engine
    run(engine.close())


@pytest.fixture(params=KINDS)
def engine(request: pytest.FixtureRequest) -> Engine:
    """The engine under contract."""
    built: Engine = request.getfixturevalue(f"{request.param}_engine")
    return built
