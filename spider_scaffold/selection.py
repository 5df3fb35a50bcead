"""What of a config is left to do, where its tree holds runs that are done.

A job selects its instances on the server, by ``instance_filter``, ``seed`` and ``max_instances``
(``swe_tasks.selection``): the first so many in an order that is the same every time. Leaving out
done ones with a filter, and asking for as many fewer, gives the rest of the same selection, where
it is sure that they were part of it.
"""

from __future__ import annotations

__all__ = ["SELECTING", "Rest", "rest_of"]

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Final

from spider_sdk.config.model import SweConfig
from spider_sdk.errors import UsageError
from spider_worker.trajectories.output_file import Index

#: The keys that decide which runs there are.
SELECTING: Final = frozenset(
    {"dataset", "split", "instance_filter", "max_instances", "seed", "n_attempts"}
)


@dataclasses.dataclass(frozen=True)
class Rest:
    """``changes`` to the config that leave out what is done (none: all is to be done); ``done``
    is the number of instances left out. ``nothing``: no instance is left."""

    changes: Mapping[str, Any]
    done: int
    nothing: bool = False


def rest_of(swe: SweConfig, index: Index, before: Mapping[str, Any] | None) -> Rest:
    """``before`` is the tree's metadata from the last start (None: there was none).

    Raises UsageError where it cannot be told whether the done runs are of this selection.
    """
    pattern = re.compile(swe.instance_filter or "")
    runs = collections.Counter(instance for instance, n in index.done if n < swe.n_attempts)
    done = sorted(
        name for name, count in runs.items() if count == swe.n_attempts and pattern.match(name)
    )
    if not done:
        return Rest({}, 0)
    changes: dict[str, Any] = {}
    if swe.max_instances is not None:
        if not _within(swe, before or {}):
            raise UsageError(
                f"{index.path.parent} holds {len(done)} instances that are done and were selected "
                "by another instance_filter, seed or max_instances, so that it cannot be told how "
                "many of this selection are left: put those back, or use another eval_output_dir"
            )
        changes["max_instances"] = swe.max_instances - len(done)
        if changes["max_instances"] <= 0:
            return Rest({}, len(done), nothing=True)
    names = "|".join(map(re.escape, done))
    changes["instance_filter"] = rf"(?!(?:{names})\Z)(?:{swe.instance_filter or ''})"
    return Rest(changes, len(done))


def _within(swe: SweConfig, before: Mapping[str, Any]) -> bool:
    """Whether every instance that was selected before is selected now."""
    details = before.get("details") or {}
    same = all(details.get(key) == getattr(swe, key) for key in ("instance_filter", "seed"))
    most = details.get("max_instances")
    assert swe.max_instances is not None
    return same and isinstance(most, int) and most <= swe.max_instances
