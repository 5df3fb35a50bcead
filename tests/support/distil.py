"""A training job between two tiny models of different tokenizers, run in this process."""

from __future__ import annotations

__all__ = ["Models", "Run", "make_models", "training_job"]

import asyncio
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spider_sdk.config import parse_job
from spider_sdk.config.model import JobConfig
from spider_worker.pipelines.local import LocalContext, LocalResult, LocalStore, run_job_locally
from spider_worker.pipelines.onpolicy_train.build import real_parts
from spider_worker.pipelines.onpolicy_train.parts import Parts
from spider_worker.pipelines.onpolicy_train.pipeline import OnPolicyPipeline
from spider_worker.settings import WorkerSettings
from spider_worker.testing import InMemorySource
from tests.support.tiny_model import make_tiny_model


@dataclasses.dataclass(frozen=True)
class Models:
    """Folders under ``root``; the teacher's tokenizer has other tokens than the student's."""

    root: Path
    student: Path
    teacher: Path


def make_models(root: Path) -> Models:
    student = make_tiny_model(root / "student", vocabulary=384, hidden=32, context=128)
    teacher = make_tiny_model(root / "teacher", vocabulary=512, hidden=32, context=256, seed=1)
    return Models(root, student, teacher)


def training_job(models: Models, **sections: Any) -> dict[str, Any]:
    """The document of a small job; ``options`` are on-policy options, other ``sections`` are
    merged into the job's."""
    options = {
        "teacher": {"name": str(models.teacher)},
        "learning_rate": 1e-2,
        "groups_per_batch": 4,
        "group_size": 2,
        "max_tokens": 6,
        "lora_rank": 4,
        "seed": 5,
        "eval_examples": 2,
        # Random weights say a lot that is no text.
        "min_coverage": 0.01,
        **sections.pop("options", {}),
    }
    document: dict[str, Any] = {
        "model": {"provider": "local", "name": str(models.student)},
        "source": {"dataset": "rows", "field": "question"},
        "generation": {"on_policy": True, "on_policy_options": options},
    }
    for name, section in sections.items():
        old = document.get(name)
        document[name] = {**old, **section} if isinstance(old, dict) else section
    return document


class Run:
    """One job's life in ``folder``, which may take several attempts: each ``go`` is one, with
    everything made anew but what the store kept. ``changes`` replace parts of the pipeline, each
    a function of the real part."""

    def __init__(
        self,
        folder: Path,
        models: Models,
        *,
        rows: int | list[dict[str, Any]] = 26,
        changes: Mapping[str, Callable[[Any], Any]] | None = None,
        **sections: Any,
    ) -> None:
        self.document = training_job(models, **sections)
        job = parse_job(self.document)
        assert isinstance(job, JobConfig)
        self.job = job
        self.folder = folder
        self._settings = WorkerSettings(
            data_roots=str(models.root), state=folder / "worker", sandbox="process"
        )
        self._rows = rows
        self._changes = dict(changes or {})
        self.ctx: LocalContext

    def parts(self) -> Parts:
        rows = self._rows
        if isinstance(rows, int):
            rows = [
                {"question": f"count {n} and {n + 3}", "kind": "even" if n % 2 == 0 else "odd"}
                for n in range(rows)
            ]
        parts = dataclasses.replace(
            real_parts(self._settings), source=lambda ctx, seed: InMemorySource(rows), save_pace=1e9
        )
        made = {name: change(getattr(parts, name)) for name, change in self._changes.items()}
        return dataclasses.replace(parts, **made)

    def go(self, *, retry: bool = False, secrets: Mapping[str, str] | None = None) -> LocalResult:
        async def main() -> LocalResult:
            store = LocalStore(self.folder)
            self.ctx = LocalContext(store, self.job, document=self.document, secrets=secrets or {})
            return await run_job_locally(
                OnPolicyPipeline(self.job, self.parts()), self.ctx, retry=retry
            )

        return asyncio.run(main())

    def events(self, code: str) -> list[Mapping[str, Any]]:
        """The data of the last attempt's events of that code."""
        return [data for _, name, _, data in self.ctx.events if name == code]

    def artifact(self, name: str) -> Path:
        return self.folder / "artifacts" / name

    def metrics(self) -> list[dict[str, Any]]:
        """The records of ``metrics.jsonl``."""
        return [
            json.loads(line) for line in self.artifact("metrics.jsonl").read_bytes().splitlines()
        ]
