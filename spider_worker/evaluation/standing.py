"""Of a record: whether its run can be judged by its patch, and what was found out about that."""

from __future__ import annotations

__all__ = ["judgeable", "known_verdict"]

from spider_worker.evaluation.verdict import patch_digest
from spider_worker.trajectories.record import Record


def judgeable(record: Record) -> bool:
    """Whether a patch that does not resolve the instance, or none, would be the agent's doing.

    It is not where the run was kept from its end (the model's endpoint failed, the workspace broke,
    the job was cancelled): what there is of a patch then says nothing. A run whose time was used up
    counts where it got far enough to leave one.
    """
    if record.data.get("status") is None:  # an older writer's: the error may be a used-up limit
        return bool((record.git_patch or "").strip()) or record.error is None
    return record.done or (record.status == "timeout" and record.git_patch is not None)


def known_verdict(record: Record) -> bool | None:
    """What was said of the patch that the record has now; None where that is nothing."""
    digest = (record.report or {}).get("patch_sha256")
    same = not digest or digest == patch_digest(record.git_patch or "")
    return record.resolved if same else None
