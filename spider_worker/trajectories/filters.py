"""Which runs go into a data set: ``push_filter``.

A run without a turn of the agent (its workspace could not be had, say) is left out of every data
set: there is nothing to learn from, and a conversation without messages breaks trainers.
"""

from __future__ import annotations

__all__ = ["FILTERS", "accepts"]

from collections.abc import Mapping
from typing import Final

from spider_sdk.errors import UsageError
from spider_worker.trajectories.output_file import Entry

#: Each filter, in the words of the card.
FILTERS: Final[Mapping[str, str]] = {
    "all": "every run, however it ended",
    "finished": "runs that the agent ended with a change (`finished`)",
    "resolved": "runs whose change passed the tests (`resolved`)",
}


def accepts(push_filter: str, entry: Entry) -> bool:
    """Whether a run takes part. A run that nobody has judged is not resolved. Raises UsageError
    for a filter that is none."""
    if push_filter not in FILTERS:
        raise UsageError(f"push_filter is all, finished or resolved, not {push_filter!r}")
    if push_filter == "finished":
        return entry.status == "finished"
    return push_filter == "all" or entry.resolved is True
