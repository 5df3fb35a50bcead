"""``metadata.json``: the settings that a run's records were made with.

A run that is started again in the same tree goes on. It may select other instances, wait longer or
reach the model elsewhere; with settings that change what a record holds it is refused, or one
data set would mix two experiments.
"""

from __future__ import annotations

__all__ = ["differing", "open_run", "read_metadata", "run_metadata", "take_versions"]

import datetime
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from spider_sdk.config.model import SweConfig
from spider_sdk.errors import UsageError
from spider_worker.sinks.atomic import atomic_path

#: The keys (dotted where nested) that decide what a record holds. The rest selects instances,
#: bounds time, or says when, where and by which version of Spider a run was made.
_DECISIVE: Final = (
    "agent_class",
    "llm_config.model",
    "llm_config.temperature",
    "max_iterations",
    "dataset",
    "data_split",
    "condenser_config",
    "details.workspace",
    "details.max_budget_per_instance",
)


def run_metadata(
    config: SweConfig,
    *,
    agent_config: Mapping[str, Any] | None = None,
    start_time: datetime.datetime | None = None,
    git_commit: str | None = None,
) -> dict[str, Any]:
    """The metadata of a config, with the keys that readers of OpenHands' files know; no key or
    other secret is in it, but the name of the variable that holds the model's. ``start_time`` None:
    now. ``git_commit`` None: Spider is installed from a package; ``details`` has its version."""
    started = start_time or datetime.datetime.now(datetime.UTC)
    return {
        "agent_class": config.agent_class,
        "llm_config": {
            "model": config.llm_model,
            "base_url": config.llm_base_url,
            "api_key_env": config.llm_api_key_env,
            "temperature": config.temperature,
            "input_cost_per_token": config.input_cost_per_token,
            "output_cost_per_token": config.output_cost_per_token,
        },
        "agent_config": None if agent_config is None else dict(agent_config),
        "max_iterations": config.max_iterations,
        "eval_output_dir": config.eval_output_dir,
        "start_time": started.isoformat(timespec="seconds"),
        "git_commit": git_commit,
        "dataset": config.dataset,
        "data_split": config.split,
        "details": {
            "spider": importlib.metadata.version("spider-distill"),
            "workspace": config.workspace,
            "instance_filter": config.instance_filter,
            "max_instances": config.max_instances,
            "seed": config.seed,
            "n_attempts": config.n_attempts,
            "max_retries": config.max_retries,
            "timeout_seconds": config.timeout_seconds,
            "max_budget_per_instance": config.max_budget_per_instance,
        },
        "condenser_config": config.condenser,
    }


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The dotted keys in which two runs differ so that their records do not belong together."""
    return [key for key in _DECISIVE if _at(before, key) != _at(now, key)]


def open_run(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``metadata.json`` at ``path``, or go on with the one that is there. Returns what then
    stands there: the settings of now, with the time of the first start and the versions that were
    taken over (``take_versions``) and are not known here.

    Raises UsageError, naming keys and both values, where the run may not go on with these settings.
    """
    before = read_metadata(path)
    wanted: dict[str, Any] = json.loads(json.dumps(metadata))
    if before is not None:
        keys = differing(before, wanted)
        if keys:
            said = "; ".join(
                f"{key} was {json.dumps(_at(before, key))}, is {json.dumps(_at(wanted, key))}"
                for key in keys
            )
            raise UsageError(
                f"{path.parent} holds a run with other settings, and it cannot go on with these: "
                f"{said}. Use another eval_output_dir, or put the settings back"
            )
        wanted["start_time"] = before.get("start_time") or wanted.get("start_time")
        wanted["details"] = _details(before) | _details(wanted)
    if wanted != before:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, wanted)
    return wanted


def take_versions(path: Path, made: Mapping[str, Any]) -> None:
    """Have the ``metadata.json`` at ``path``, where there is one, name the versions that the
    records were made with: ``made`` is the metadata of the job that made them. What else it says
    stays. Raises UsageError for one that cannot be read."""
    before = read_metadata(path)
    if before is None:
        return
    ours, theirs = _details(before), _details(made)
    taken = {key: value for key, value in theirs.items() if key == "spider" or key not in ours}
    wanted = {**before, "details": ours | taken}
    if made.get("agent_config") is not None:
        wanted["agent_config"] = made["agent_config"]
    if wanted != before:
        _write(path, wanted)


def read_metadata(path: Path) -> dict[str, Any] | None:
    """What is in the file, None where there is none. Raises UsageError for one that cannot be
    read."""
    try:
        metadata = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not isinstance(metadata, dict):
        raise UsageError(f"{path} cannot be read: it is not a JSON object")
    return metadata


def _write(path: Path, metadata: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _details(metadata: Mapping[str, Any]) -> dict[str, Any]:
    details = metadata.get("details")
    return dict(details) if isinstance(details, Mapping) else {}


def _at(metadata: Mapping[str, Any], key: str) -> Any:
    value: Any = metadata
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
