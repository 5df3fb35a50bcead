"""Runs to be tracked, as the pipeline would have them."""

from __future__ import annotations

__all__ = ["Tracked", "on_policy_job", "write_metrics"]

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spider_sdk.config.model import (
    GenerationConfig,
    JobConfig,
    ModelConfig,
    OnPolicyOptions,
    OutputConfig,
    SourceConfig,
    TeacherConfig,
)


def on_policy_job(output: OutputConfig | None = None, **options: Any) -> JobConfig:
    """A job that trains org/student on org/questions with org/teacher."""
    options.setdefault("teacher", (TeacherConfig("org/teacher"),))
    return JobConfig(
        model=ModelConfig("local", "org/student"),
        source=SourceConfig("org/questions", field="question"),
        generation=GenerationConfig(on_policy=True, on_policy_options=OnPolicyOptions(**options)),
        output=output or OutputConfig(),
    )


@dataclasses.dataclass
class Tracked:
    """What a tracker asks of a JobContext. ``events`` are (level, code, message)."""

    scratch: Path
    job: JobConfig
    secrets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    job_id: str = "0123456789abcdef"
    events: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    def event(
        self, level: str, code: str, message: str, data: Mapping[str, Any] | None = None
    ) -> None:
        self.events.append((level, code, message))

    @property
    def codes(self) -> list[str]:
        return [code for _, code, _ in self.events]


def write_metrics(path: Path, steps: Iterable[int]) -> Path:
    """A ``metrics.jsonl`` whose KL is a tenth of the step."""
    lines = (
        {"id": f"step-{step:06d}", "step": step, "kl": step / 10, "stop_kl": None} for step in steps
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
