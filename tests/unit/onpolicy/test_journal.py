"""``metrics.jsonl``: one record a step, cut back to the state that is gone on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spider_worker.pipelines.onpolicy_train.journal import MetricsJournal


class Context:
    """What a journal asks of a UnitContext."""

    def __init__(self, folder: Path, previous: list[Path]) -> None:
        self.path = folder
        self._previous = previous
        self.published = 0

    def previous(self) -> list[Path]:
        return self._previous

    def open_journal(self) -> Path:
        self.path.touch()
        return self.path

    def publish_journal(self) -> None:
        self.published += 1
        self.text = self.path.read_text()


def write(context: Any, steps: range, resumed: int = 0) -> None:
    journal = MetricsJournal(context, resumed)
    for step in steps:
        journal.add(step, {"kl": step / 2})
    journal.close()


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_what_came_after_the_state_did_not_happen(tmp_path: Path) -> None:
    first = Context(tmp_path / "a", [])
    write(first, range(6))
    second = Context(tmp_path / "b", [first.path])
    write(second, range(4, 6), resumed=3)
    assert steps(second.path) == [0, 1, 2, 3, 4, 5]
    # Registered with what was taken over, before anything is added.
    assert len(second.text.splitlines()) == 4


def test_without_a_state_a_run_begins_anew(tmp_path: Path) -> None:
    first = Context(tmp_path / "a", [])
    write(first, range(3))
    second = Context(tmp_path / "b", [first.path])
    write(second, range(2))
    assert steps(second.path) == [0, 1]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    first = Context(tmp_path / "a", [])
    write(first, range(3))
    with first.path.open("ab") as file:
        file.write(b'{"id": "step-000003", "st')
    second = Context(tmp_path / "b", [first.path])
    write(second, range(0), resumed=2)
    assert steps(second.path) == [0, 1, 2]


def test_lines_begin_with_the_id_and_hold_no_nan(tmp_path: Path) -> None:
    context = Context(tmp_path / "a", [])
    journal = MetricsJournal(context, 0)  # type: ignore[arg-type]
    record = journal.add(7, {"kl": float("nan"), "loss": float("inf"), "tokens": 3.0})
    journal.close()
    line = context.path.read_text()
    assert line.startswith('{"id":"step-000007"')
    assert json.loads(line) == {
        "id": "step-000007",
        "step": 7,
        "kl": None,
        "loss": None,
        "tokens": 3.0,
    }
    assert journal.last is record
