"""One tiny student for the session, and a trainer of it that a test need not close."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spider_worker.trainers.local import LocalTrainer
from tests.support.tiny_model import tiny_model

__all__ = ["tiny_model"]


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as loop:
        yield loop


@pytest.fixture
def start(tiny_model: Path, runner: asyncio.Runner) -> Iterator[Callable[..., LocalTrainer]]:
    started: list[LocalTrainer] = []

    def begin(
        *,
        model: Path = tiny_model,
        lora_rank: int = 4,
        seed: int | None = 7,
        server: Any = None,
        checkpoint: str | None = None,
        **parameters: Any,
    ) -> LocalTrainer:
        trainer = LocalTrainer(
            str(model),
            lora_rank=lora_rank,
            parameters=parameters,
            seed=seed,
            server=server,
            checkpoint=checkpoint,
        )
        started.append(trainer)
        runner.run(trainer.start())
        return trainer

    yield begin
    for trainer in started:
        runner.run(trainer.close())
