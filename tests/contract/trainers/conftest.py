"""Trainers of every kind, on one loop and one tiny student.

Another kind is another entry of ``KINDS`` and a fixture ``<name>_kind`` that gives a ``Kind``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from spider_worker.trainers.base import Trainer
from tests.support.tinker_server import TinkerServer
from tests.support.tiny_model import tiny_model

__all__ = ["tiny_model"]

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]

KINDS = ["local", "tinker"]


@dataclasses.dataclass(frozen=True)
class Kind:
    """``make(lora_rank=…, seed=…)`` gives a trainer that is not started. Log-probabilities of
    two computations of the same agree to ``tolerance``. ``exact``: a resumed run is equal bit by
    bit. ``folder`` holds the base model."""

    name: str
    make: Callable[..., Trainer]
    folder: Path
    tolerance: float
    exact: bool


@pytest.fixture(scope="session")
def run() -> Iterator[Run[Any]]:
    """Runs a coroutine on one loop that lives as long as the session's trainers."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="trainers", daemon=True)
    thread.start()
    yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(600)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture(scope="session")
def local_kind(tiny_model: Path) -> Kind:
    from spider_worker.trainers.local import LocalTrainer

    def make(*, lora_rank: int = 4, seed: int | None = 7, **options: Any) -> Trainer:
        return LocalTrainer(str(tiny_model), lora_rank=lora_rank, seed=seed, **options)

    return Kind("local", make, tiny_model, tolerance=1e-4, exact=True)


@pytest.fixture(scope="session")
def tinker_kind(tinker_server: TinkerServer) -> Kind:
    from spider_worker.trainers.tinker import TinkerTrainer

    def make(*, lora_rank: int = 4, seed: int | None = 7, **options: Any) -> Trainer:
        return TinkerTrainer(
            tinker_server.name,
            lora_rank=lora_rank,
            seed=seed,
            base_url=tinker_server.url,
            **options,
        )

    return Kind("tinker", make, tinker_server.model, tolerance=1e-4, exact=True)


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.getfixturevalue(f"{request.param}_kind")
    return found


@pytest.fixture
def start(kind: Kind, run: Run[Any]) -> Iterator[Callable[..., Trainer]]:
    """Makes and starts a trainer, and closes it after the test."""
    started: list[Trainer] = []

    def begin(**options: Any) -> Trainer:
        trainer = kind.make(**options)
        started.append(trainer)
        run(trainer.start())
        return trainer

    yield begin
    for trainer in started:
        run(trainer.close())
