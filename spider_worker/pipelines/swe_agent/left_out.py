"""Runs that a job selects and does not make: ``leave_out``, a file that travels with it.

A tree that holds runs which are done has the rest made by another job. Naming them one by one
keeps the selection the user's own, whatever its expression is, and parts an instance whose first
run is done from its others.
"""

from __future__ import annotations

__all__ = ["read_left_out"]

import json
from collections.abc import Iterator
from pathlib import Path

from spider_sdk.errors import FatalJobError
from spider_worker.pipelines.swe_agent.parts import Ctx
from spider_worker.trajectories.record import Key


def read_left_out(ctx: Ctx) -> frozenset[Key]:
    """(instance, independent run from 0) of each. Raises FatalJobError for a file that was not
    uploaded or holds anything else."""
    named = ctx.job.leave_out
    if named is None:
        return frozenset()
    digests = [file.sha256 for file in ctx.job.inputs if file.name == named]
    if not digests:
        raise FatalJobError(
            f"leave_out: {named} was not uploaded; submit the job with `spider-scaffold openhands` "
            "or `spider submit`, which upload it"
        )
    return frozenset(_keys(ctx.input_path(digests[0]), named))


def _keys(path: Path, named: str) -> Iterator[Key]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        match found:
            case [str(instance), int(n)]:
                yield instance, n
            case _:
                said = f'leave_out: {named}, line {number}: expected ["<instance_id>", <n>]'
                raise FatalJobError(said)
