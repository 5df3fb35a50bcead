"""Token engines of every kind over one tiny model, on one loop.

Another kind is another entry of ``KINDS`` and a fixture ``<name>_kind`` that gives a ``Kind``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from spider_worker.tokens import TokenEngine
from tests.support.reference import load_reference, make_adapter
from tests.support.tiny_model import tiny_model
from tests.support.vllm_server import VllmServer

__all__ = ["tiny_model"]

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]

#: The most tokens of a sequence, for each of the kinds.
CONTEXT = 96
HAS_VLLM = importlib.util.find_spec("vllm") is not None
VLLM_MARKS = [
    pytest.mark.vllm,
    pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed"),
]
_ADAPTER = pytest.param("adapter", marks=VLLM_MARKS)
#: Those that score given tokens, which vllm does not under an adapter.
SCORERS = ["torch", *(pytest.param(name, marks=VLLM_MARKS) for name in ("vllm", "openai"))]
KINDS = [*SCORERS, _ADAPTER]
CACHE = 1 << 26
ARGUMENTS = {
    "max_num_seqs": 32,
    "block_size": 32,
    "kv_cache_memory_bytes": CACHE,
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """``engine`` has started. ``make`` gives one like it that has not. ``reference`` is the model
    under transformers, and values agree with it to ``tolerance``."""

    engine: TokenEngine
    make: Callable[[], TokenEngine]
    reference: Any
    tolerance: float = 1e-4


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For processes started inside: the threads of vllm's kernels wait for each other after every
    layer, which takes a slice of the processor's time each where tests share it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def run() -> Iterator[Run[Any]]:
    """Runs a coroutine on one loop that lives as long as the session's engines."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="token-engines", daemon=True)
    thread.start()
    yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(700)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture(scope="session")
def plain(tiny_model: Path) -> Any:
    return load_reference(tiny_model)


@pytest.fixture(scope="session")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters on the tiny model, each quite another."""
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(tiny_model, folder / str(seed), seed=seed) for seed in range(3)]


@pytest.fixture(scope="session")
def torch_kind(tiny_model: Path, plain: Any, run: Run[Any]) -> Iterator[Kind]:
    from spider_worker.engines.tokens.torch_engine import TorchTokenEngine

    def make() -> TokenEngine:
        return TorchTokenEngine(str(tiny_model), parameters={"max_model_len": CONTEXT})

    engine = make()
    run(engine.start())
    yield Kind(engine, make, plain)
    run(engine.close())


@pytest.fixture(scope="session")
def vllm_kind(tiny_model: Path, plain: Any, run: Run[Any]) -> Iterator[Kind]:
    from spider_worker.engines.tokens.vllm import VllmTokenEngine

    def make() -> TokenEngine:
        arguments = {**ARGUMENTS, "max_model_len": CONTEXT + 1}
        return VllmTokenEngine(str(tiny_model), arguments=arguments)

    engine = make()
    with one_thread():
        run(engine.start())
    yield Kind(engine, make, plain)
    run(engine.close())


@pytest.fixture(scope="session")
def adapter_server(tiny_model: Path, run: Run[Any]) -> Iterator[Any]:
    from spider_worker.engines.tokens.vllm import VllmAdapterServer

    arguments = {**ARGUMENTS, "max_model_len": CONTEXT}
    server = VllmAdapterServer(str(tiny_model), lora_rank=4, arguments=arguments)
    with one_thread():
        run(server.start())
    yield server
    run(server.close())


@pytest.fixture(scope="session")
def adapter_kind(
    tiny_model: Path, adapter_server: Any, adapters: list[Path], run: Run[Any]
) -> Kind:
    engine = run(adapter_server.serve(adapters[0]))

    def make() -> TokenEngine:
        raise AssertionError("its server gives it when it has started")

    return Kind(engine, make, load_reference(tiny_model, adapters[0]))


@pytest.fixture(scope="session")
def vllm_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("vllm-server") / "log"
    options = {
        "--max-model-len": CONTEXT + 1,
        "--block-size": 32,
        "--max-num-seqs": 32,
        "--kv-cache-memory-bytes": CACHE,
    }
    with one_thread():
        server = VllmServer(tiny_model, log, *(str(p) for item in options.items() for p in item))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def openai_kind(vllm_server: VllmServer, plain: Any, run: Run[Any]) -> Iterator[Kind]:
    from spider_worker.engines.tokens.openai import OpenAITokenEngine

    url = vllm_server.base_url()

    def make() -> TokenEngine:
        return OpenAITokenEngine("tiny", base_url=url, api_key=vllm_server.key)

    engine = make()
    run(engine.start())
    yield Kind(engine, make, plain)
    run(engine.close())


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.getfixturevalue(f"{request.param}_kind")
    return found


@pytest.fixture(scope="session", params=SCORERS)
def scorer(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.getfixturevalue(f"{request.param}_kind")
    return found
