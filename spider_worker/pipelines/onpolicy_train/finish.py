"""The end of a run: its curves, its adapter, the repository on the Hub, the summary."""

from __future__ import annotations

__all__ = [
    "ADAPTER_FILES",
    "closing_files",
    "figure_files",
    "final_figures",
    "published_files",
    "summarise",
]

import json
import platform
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from spider_worker.pipelines.base import JobContext
from spider_worker.pipelines.onpolicy_train.checkpoints import Progress
from spider_worker.pipelines.onpolicy_train.record import record_id

#: What PEFT writes and reads.
ADAPTER_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
_PACKAGES: Final = (
    "spider-distill", "datasets", "huggingface_hub", "peft", "tinker", "torch", "transformers",
    "vllm",
)  # fmt: skip


def closing_files(adapter: Path, metrics: Path, curves: Path | None) -> dict[str, Path]:
    """The artifacts of a run by name. ``metrics`` is copied: the journal itself is committed as
    the unit's file."""
    copy = metrics.with_name("metrics.jsonl")
    shutil.copyfile(metrics, copy)
    files = {f"adapter/{name}": adapter / name for name in ADAPTER_FILES}
    return files | figure_files(copy, curves)


def figure_files(metrics: Path, curves: Path | None) -> dict[str, Path]:
    """A run's figures by the names of their artifacts."""
    return {"metrics.jsonl": metrics} | ({} if curves is None else {"curves.png": curves})


def published_files(ctx: JobContext, progress: Progress) -> dict[str, Path]:
    """What goes to the Hub, by its path there: the adapter at the root, where ``peft`` looks for
    it, and each checkpoint under its step."""
    found: dict[str, Path | None] = {
        name: ctx.artifact(f"adapter/{name}") for name in ADAPTER_FILES
    }
    found |= {name: ctx.artifact(name) for name in ("metrics.jsonl", "curves.png")}
    for step in progress.saved:
        for name in ADAPTER_FILES:
            path = f"checkpoints/{record_id(step)}/{name}"
            found[path] = ctx.artifact(path)
    return {name: path for name, path in found.items() if path is not None}


def final_figures(metrics: Path | None) -> dict[str, Any]:
    """The last record of ``metrics.jsonl``, with what further records of its step add; empty
    where no step was made."""
    if metrics is None:
        return {}
    last: dict[str, Any] = {}
    for line in metrics.read_bytes().splitlines()[-2:]:
        record = json.loads(line)
        last = {**last, **record} if last.get("step") == record["step"] else record
    return last


def summarise(
    ctx: JobContext, progress: Progress, figures: Mapping[str, Any], remote: str | None
) -> dict[str, Any]:
    """The document ``summary.json``: ``job`` is the recipe as submitted, without secrets."""
    return {
        "job_id": ctx.job_id,
        "job": dict(ctx.document),
        "steps": progress.step,
        "ended": progress.ended,
        "sampled_tokens": progress.tokens,
        "seed": progress.seed,
        "rows_error": progress.row_errors,
        "rows_dropped": progress.rows_dropped,
        "batches_skipped": progress.batches_skipped,
        "checkpoints": progress.saved,
        "final": dict(figures),
        "remote_artifact": remote,
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
