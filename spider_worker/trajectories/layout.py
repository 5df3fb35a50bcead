"""The names in a run's output tree, and of its configuration on the Hub.

::

    {eval_output_dir}/
    └── SWE-bench__SWE-smith-train/         data set and split
        └── CodeActAgent/                   agent class
            └── gpt-4o_maxiter_30/          model and max_iterations
                ├── output.jsonl
                ├── metadata.json
                └── infer_logs/instance_<id>.log

Names come from configs and from data sets, so nothing in them is trusted: each ends as one
component of a path, of ASCII letters, digits, ``.``, ``_`` and ``-``, never empty, hidden or too
long. What is such a name already stays as it is; another one gets a piece of its SHA-256, so that
two names never meet in one file.
"""

from __future__ import annotations

__all__ = [
    "INFER_LOGS",
    "METADATA",
    "OUTPUT",
    "Layout",
    "config_name",
    "dataset_name",
    "is_local",
    "log_name",
    "model_name",
    "safe_name",
    "shown_name",
]

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Final

OUTPUT: Final = "output.jsonl"
METADATA: Final = "metadata.json"
INFER_LOGS: Final = "infer_logs"

#: Bytes in a component; file systems take 255, and temporary names add to it.
MAX_NAME: Final = 180
#: Characters in a configuration's name on the Hub, which is also a folder in caches.
MAX_CONFIG_NAME: Final = 96

_DIGEST: Final = 8
_SAFE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_SUFFIX: Final = re.compile(r"\.(?:jsonl?|ndjson|parquet)\Z", re.IGNORECASE)
_LOCAL: Final = re.compile(r"[./~\\]|[A-Za-z]:[/\\]")


def safe_name(name: str, limit: int = MAX_NAME) -> str:
    """``name`` as one component of a path, at most ``limit`` characters long (at least 16)."""
    if _SAFE.fullmatch(name) and len(name) <= limit:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST]
    kept = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".-")
    return f"{kept[: limit - _DIGEST - 1] or '_'}-{digest}"


def is_local(dataset: str) -> bool:
    """Whether a data set is named by a path (offline format) and not by its id on the Hub."""
    return _LOCAL.match(dataset) is not None or _SUFFIX.search(dataset) is not None


def dataset_name(dataset: str) -> str:
    """``SWE-bench/SWE-smith`` as ``SWE-bench__SWE-smith``; of a local file its name without the
    suffix, since the folders before it differ between client and worker and are private."""
    if is_local(dataset):
        last = _last_part(dataset)
        return safe_name(_SUFFIX.sub("", last) or last)
    return safe_name(dataset.replace("/", "__"))


def model_name(model: str) -> str:
    """The last part of a model's name, with ``:`` as ``_`` and ``@`` as ``-``."""
    return safe_name(_last_part(model).replace(":", "_").replace("@", "-"))


def shown_name(name: str) -> str:
    """A model's or a data set's name as it may be published: of a path only the last part."""
    return _last_part(name) if is_local(name) else name


def log_name(instance_id: str, n: int = 0) -> str:
    """The log's file name: ``instance_<id>.log`` for the first of several independent runs of the
    instance (``n`` from 0), ``instance_<id>.run<n>.log`` for the others."""
    run = f".run{n}" if n else ""
    return f"instance_{safe_name(instance_id)}{run}.log"


def config_name(model: str, dataset: str, max_iterations: int) -> str:
    """The Hub configuration of a run that names none: ``{model}_{dataset}_{maxiter}iter``."""
    tail = f"_{max_iterations}iter"
    named = f"{model_name(model)}_{dataset_name(dataset)}"
    return safe_name(named, MAX_CONFIG_NAME - len(tail)) + tail


def _last_part(name: str) -> str:
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one run's files are; ``root`` is the folder that holds ``output.jsonl``."""

    root: Path

    @classmethod
    def of(
        cls,
        eval_output_dir: str | Path,
        *,
        dataset: str,
        split: str,
        agent_class: str,
        model: str,
        max_iterations: int,
    ) -> Layout:
        """The tree of a config. Creates nothing."""
        return cls(
            Path(eval_output_dir)
            / safe_name(f"{dataset_name(dataset)}-{split}")
            / safe_name(agent_class)
            / safe_name(f"{model_name(model)}_maxiter_{max_iterations}")
        )

    @property
    def output(self) -> Path:
        return self.root / OUTPUT

    @property
    def metadata(self) -> Path:
        return self.root / METADATA

    @property
    def logs(self) -> Path:
        return self.root / INFER_LOGS

    def log(self, instance_id: str, n: int = 0) -> Path:
        """The log of an instance; ``n`` as in ``log_name``."""
        return self.logs / log_name(instance_id, n)
