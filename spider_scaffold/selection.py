"""What of a config is left to do, where its tree holds runs that are done.

A job selects its instances on the server, by ``instance_filter``, ``seed`` and ``max_instances``
(``swe_tasks.selection``). The rest of a tree is a job with the same selection, and a file that
names the runs which it is not to make (``leave_out``).
"""

from __future__ import annotations

__all__ = ["SELECTING", "done_runs", "write_left_out"]

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from spider_scaffold.jobfile import FOLDER
from spider_sdk.config.model import SweConfig
from spider_worker.sinks.atomic import atomic_path
from spider_worker.trajectories.output_file import Index
from spider_worker.trajectories.record import Key

#: The keys that decide which runs there are.
SELECTING: Final = frozenset(
    {"dataset", "split", "instance_filter", "max_instances", "seed", "n_attempts", "leave_out"}
)


def done_runs(swe: SweConfig, index: Index) -> list[Key]:
    """The runs that are done and that the config could select, in order."""
    pattern = re.compile(swe.instance_filter or "")
    return sorted(
        (instance, n)
        for instance, n in index.done
        if n < swe.n_attempts and pattern.match(instance)
    )


def write_left_out(tree: Path, runs: Iterable[Key], also: str | None) -> Path:
    """The file that a job's ``leave_out`` names; ``also`` is the one that the config names (None:
    it names none), whose lines go in too. Raises OSError where that cannot be read."""
    lines = [json.dumps(run) for run in runs]
    if also is not None:
        lines += Path(also).expanduser().read_text("utf-8").splitlines()
    path = tree / FOLDER / "done.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path
