"""States that training goes on from, and the adapters that are kept.

Two things are saved under the unit's fence. A *state* (adapter, moments, cursor, totals) is what
the next attempt begins with; there is one, and each takes the place of the one before. A
*checkpoint* is the adapter alone, in PEFT's format, under its step; the job's ``save_every`` asks
for them and they stay.
"""

from __future__ import annotations

__all__ = ["Checkpoints", "Progress", "adapter_files"]

import asyncio
import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from spider_sdk.errors import FatalJobError
from spider_worker.pipelines.base import JobContext, UnitContext
from spider_worker.pipelines.calls import persist
from spider_worker.pipelines.onpolicy_train.prompts import Cursor
from spider_worker.pipelines.onpolicy_train.record import record_id
from spider_worker.trainers.base import Trainer

_FORMAT: Final = 1
#: A state may take a fiftieth of the time, whatever the pace.
_SHARE: Final = 50


@dataclasses.dataclass
class Progress:
    """Where training is. ``step`` counts finished batches, ``saved`` names those with a
    checkpoint, and ``batches_skipped`` counts those that nothing could be learnt from;
    ``signals`` are what the teachers are asked for. ``seed`` is the run's."""

    step: int = 0
    cursor: Cursor = Cursor()
    tokens: int = 0
    row_errors: int = 0
    rows_dropped: int = 0
    batches_skipped: int = 0
    seed: int | None = None
    saved: list[int] = dataclasses.field(default_factory=list)
    ended: str | None = None  #: why the run ended, None while it has not
    signals: Mapping[str, str] = dataclasses.field(default_factory=dict)  #: by teacher


def adapter_files(folder: Path, under: str) -> dict[str, Path]:
    """The files of a folder by artifact name."""
    return {
        f"{under}/{path.relative_to(folder).as_posix()}": path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Checkpoints:
    """Saves and loads through ``ctx``. ``pace`` is the most seconds between two states."""

    def __init__(self, ctx: UnitContext, trainer: Trainer, pace: float) -> None:
        self._ctx = ctx
        self._trainer = trainer
        self._pace = pace
        self._cost = 0.0
        self._saved_at = time.monotonic()
        self._files: list[str] = []
        self._state: Mapping[str, Any] = {}

    @staticmethod
    def progress_of(ctx: JobContext) -> tuple[Progress, Mapping[str, Any]]:
        """Where the job's training is by its last state; a fresh start where there is none."""
        state = ctx.load_state()
        if not state:
            return Progress(), {}
        if state.get("format") != _FORMAT:
            raise FatalJobError(
                f"the saved state has format {state.get('format')!r}, which this version of Spider"
                " does not read; run the job again from its last checkpoint"
            )
        fields = dict(state["progress"])
        fields["cursor"] = Cursor(**fields["cursor"])
        return Progress(**fields), state

    async def restore(self) -> Progress:
        """Load the last state into the trainer. Where there is none, the trainer's own becomes the
        first: whatever happens to this attempt, the next one begins where it did."""
        progress, state = self.progress_of(self._ctx)
        if not state:
            await self.save(progress, checkpoint=False)
            return progress
        self._state, self._files = state, list(state["files"])
        await self._load()
        return progress

    async def reload(self) -> Progress:
        """Load the last state again, in place of weights that are not to be kept."""
        progress, _ = self.progress_of(self._ctx)
        await self._load()
        return progress

    def due(self) -> bool:
        """Has enough time gone by for a state between checkpoints?"""
        return time.monotonic() - self._saved_at >= max(self._pace, _SHARE * self._cost)

    async def save(self, progress: Progress, *, checkpoint: bool) -> None:
        """Save a state and, with ``checkpoint``, the adapter under its step. Raises LeaseLost."""
        began = time.monotonic()
        name = record_id(progress.step)
        folder = self._fresh(f"state-{name}")
        trainer_state = await self._trainer.save_state(folder)
        states = adapter_files(folder, f"state/{name}")
        files, saved = dict(states), progress.saved
        if checkpoint and progress.step not in saved:
            files |= await self._adapter(name)
            saved = [*saved, progress.step]
        state = {
            "format": _FORMAT,
            "progress": dataclasses.asdict(dataclasses.replace(progress, saved=saved)),
            "trainer": trainer_state,
            "files": sorted(states),
        }
        stale = [old for old in self._files if old not in states]
        await persist(lambda: self._ctx.keep(files, state, drop=stale))
        progress.saved = saved  # not before it is so
        self._state, self._files = state, sorted(states)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - began

    async def save_adapter(self, progress: Progress) -> None:
        """Save the adapter as it is under the last step, beside the state that there is, unless
        no step was made or that one has its own. Raises LeaseLost."""
        if not progress.step or progress.step in progress.saved:
            return
        await self.keep(await self._adapter(record_id(progress.step)))

    async def keep(self, files: Mapping[str, Path]) -> None:
        """Save files beside the state that there is. Raises LeaseLost."""
        await persist(lambda: self._ctx.keep(files, self._state))

    async def _adapter(self, name: str) -> dict[str, Path]:
        folder = self._fresh(f"adapter-{name}")
        await self._trainer.save_adapter(folder)
        return adapter_files(folder, f"checkpoints/{name}")

    async def _load(self) -> None:
        folder = self._ctx.scratch / "restored"
        await asyncio.to_thread(self._gather, folder)
        await self._trainer.load_state(self._state["trainer"], folder)
        await asyncio.to_thread(shutil.rmtree, folder)

    def _fresh(self, name: str) -> Path:
        folder = self._ctx.scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _gather(self, folder: Path) -> None:
        """The state's files under their own names again."""
        shutil.rmtree(folder, ignore_errors=True)
        for name in self._files:
            path = self._ctx.artifact(name)
            if path is None:
                raise FatalJobError(f"artifact {name} of the saved state is missing")
            target = folder.joinpath(*name.split("/")[2:])
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        folder.mkdir(parents=True, exist_ok=True)
