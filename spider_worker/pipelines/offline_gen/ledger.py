"""The ledger of a unit: what became of each of its rows, and where in the journal it lies."""

from __future__ import annotations

__all__ = ["Ledger", "State"]

import enum
from array import array
from collections.abc import Iterator


class State(enum.IntEnum):
    """What became of one sample of one row."""

    MISSING = 0
    PENDING = 1  #: generated, not yet post-processed
    OK = 2
    ERROR = 3
    DROPPED = 4


class Ledger:
    """13 bytes a *slot*, whatever the rows hold.

    A slot is one sample of one row: number ``(index - start) * samples + sample``. The unit
    covers the rows from ``start`` to ``stop`` (exclusive).
    """

    def __init__(self, start: int, stop: int, samples: int) -> None:
        self.start = start
        self.stop = stop
        self.samples = samples
        slots = (stop - start) * samples
        self._states = bytearray(slots)
        self._offsets = array("q", bytes(8 * slots))
        self._lengths = array("I", bytes(4 * slots))
        self._counts = [slots, 0, 0, 0, 0]

    def __len__(self) -> int:
        return len(self._states)

    def slot(self, index: int, sample: int) -> int | None:
        """The slot of that sample, None where it belongs to another unit."""
        if self.start <= index < self.stop and 0 <= sample < self.samples:
            return (index - self.start) * self.samples + sample
        return None

    def key(self, slot: int) -> tuple[int, int]:
        """``(index, sample)`` of a slot."""
        row, sample = divmod(slot, self.samples)
        return self.start + row, sample

    def state(self, slot: int) -> State:
        return State(self._states[slot])

    def place(self, slot: int) -> tuple[int, int]:
        """``(offset, length)`` of the slot's line, newline included."""
        return self._offsets[slot], self._lengths[slot]

    def set(self, slot: int, state: State, offset: int = 0, length: int = 0) -> None:
        self._counts[self._states[slot]] -= 1
        self._counts[state] += 1
        self._states[slot] = state
        self._offsets[slot] = offset
        self._lengths[slot] = length

    def count(self, state: State) -> int:
        return self._counts[state]

    def missing_samples(self, index: int) -> list[int]:
        """Samples of a row that are still to be generated."""
        first = (index - self.start) * self.samples
        states = self._states
        return [s for s in range(self.samples) if states[first + s] == State.MISSING]

    def missing_range(self) -> tuple[int, int] | None:
        """Rows from the first to the last (exclusive) that lack a sample; None if none does."""
        first = self._states.find(State.MISSING)
        if first < 0:
            return None
        last = self._states.rfind(State.MISSING)
        return self.key(first)[0], self.key(last)[0] + 1

    def slots(self, *states: State) -> Iterator[int]:
        """Slots in one of these states, in order."""
        wanted = frozenset(states)
        return (slot for slot, state in enumerate(self._states) if state in wanted)
