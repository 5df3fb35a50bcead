"""output.jsonl through crashes, several writers and resumes."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spider_sdk.errors import UsageError
from spider_worker.trajectories.output_file import append, read, read_index, rewrite
from spider_worker.trajectories.record import STATUSES, Record, build, is_done, judged
from tests.support.trajectories import record


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "run" / "output.jsonl"


def ids(path: Path) -> list[str]:
    return [one.instance_id for one in read(path)]


def test_what_is_appended_is_read_back(output: Path) -> None:
    assert list(read(output)) == []
    append(output, record("a", n=1, attempt=2, status="timeout", error="late"))
    (read_back,) = read(output)
    assert read_back.key == ("a", 1)
    assert (read_back.attempt, read_back.status, read_back.error) == (2, "timeout", "late")
    assert (read_back.cost, read_back.resolved, read_back.model) == (0.25, None, "openai/gpt-4o")
    assert read_back.data == record("a", n=1, attempt=2, status="timeout", error="late") | {
        "metadata": read_back.data["metadata"]
    }


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_torn_last_line_is_passed_over_and_then_removed(output: Path, cut: int) -> None:
    append(output, record("a"))
    append(output, record("b"))
    whole = output.read_bytes()
    os.truncate(output, len(whole) - cut - 1)
    assert ids(output) == ["a"]
    append(output, record("c"))
    assert ids(output) == ["a", "c"]
    assert output.read_bytes().count(b"\n") == 2


def test_a_torn_line_longer_than_a_block_is_removed_too(output: Path) -> None:
    append(output, record("a"))
    with output.open("ab") as file:
        file.write(b'{"instance_id": "b", "x": "' + b"y" * 200_000)
    append(output, record("c"))
    assert ids(output) == ["a", "c"]


def test_a_record_that_lacks_only_its_line_end_is_kept(output: Path) -> None:
    append(output, record("a"))
    os.truncate(output, output.stat().st_size - 1)
    assert ids(output) == ["a"]
    append(output, record("b"))
    assert ids(output) == ["a", "b"]


def test_a_spoilt_line_in_the_middle_is_an_error_that_names_it(output: Path) -> None:
    append(output, record("a"))
    with output.open("ab") as file:
        file.write(b'{"no": "record"}\n')
    append(output, record("b"))
    with pytest.raises(UsageError, match=r"output\.jsonl, line 2: not a record"):
        list(read(output))


def test_half_of_a_surrogate_pair_survives(output: Path) -> None:
    append(output, record("a", git_patch="x\ud800y"))
    (read_back,) = read(output)
    assert read_back.git_patch == "x\ud800y"


def test_a_full_disk_leaves_the_file_as_it_was(output: Path) -> None:
    append(output, record("a"))
    before = output.read_bytes()
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from spider_worker.trajectories.output_file import append\n"
        f"signal.signal({int(signal.SIGXFSZ)}, signal.SIG_IGN)\n"
        f"resource.setrlimit({resource.RLIMIT_FSIZE}, ({len(before) + 100},) * 2)\n"
        "try: append(Path(sys.argv[1]), {'instance_id': 'b', 'x': 'y' * 100_000})\n"
        "except OSError as error: print('refused', error.errno)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(output)], capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith("refused")
    assert output.read_bytes() == before


def _write(path: Path, name: str) -> None:
    for number in range(20):
        append(path, {"instance_id": f"{name}-{number}", "x": "y" * 20_000})


def test_writers_take_turns_and_one_that_rewrites_loses_nothing(output: Path) -> None:
    append(output, record("first"))
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(output, name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for _ in range(10):
        rewrite(output, lambda one: {**one.data, "seen": True})
    for writer in writers:
        writer.join()
    assert len(set(ids(output))) == len(ids(output)) == 61


def test_rewriting_changes_every_line_and_keeps_those_that_no_longer_count(output: Path) -> None:
    append(output, record("a", status="timeout"))
    append(output, record("a", attempt=2))
    count = rewrite(output, lambda one: {**one.data, "resolved": one.status == "finished"})
    assert count == 2
    assert [one.resolved for one in read(output)] == [False, True]
    before = output.read_bytes()
    with pytest.raises(ZeroDivisionError):
        rewrite(output, lambda one: {"x": 1 // 0})
    assert output.read_bytes() == before
    assert os.listdir(output.parent) == ["output.jsonl"]
    with pytest.raises(FileNotFoundError):
        rewrite(output.with_name("none.jsonl"), lambda one: one.data)


# What a resume does ------------------------------------------------------------------


@pytest.mark.parametrize("status", STATUSES)
def test_what_is_done_is_left_alone_and_what_failed_is_tried_again(
    output: Path, status: str
) -> None:
    append(output, record("a", status=status))
    retried = {
        "timeout", "llm_refused", "llm_error", "workspace_error", "agent_error", "cancelled",
    }  # fmt: skip
    assert read_index(output).done == (frozenset() if status in retried else {("a", 0)})
    assert is_done(status) is (status not in retried)


def test_the_last_line_of_a_run_counts(output: Path) -> None:
    append(output, record("a", status="timeout"))
    append(output, record("b"))
    append(output, record("a", n=1, status="llm_error"))
    append(output, record("a", attempt=2, resolved=True))
    index = read_index(output)
    assert index.done == {("a", 0), ("b", 0)}
    assert list(index.latest) == [("a", 0), ("b", 0), ("a", 1)]
    assert index.load(index.latest["a", 0]).attempt == 2
    assert index.latest["a", 0].resolved is True
    assert [index.next_attempt(key) for key in [("a", 0), ("a", 1), ("new", 0)]] == [3, 2, 1]


def test_failures_cost_too_and_an_unknown_cost_is_not_nothing(output: Path) -> None:
    append(output, record("a", status="timeout", cost=1.0))
    append(output, record("a", attempt=2, cost=0.5))
    append(output, record("a", attempt=2, cost=0.5, resolved=True))  # judged: the same attempt
    append(output, record("b", cost=2.0))
    index = read_index(output)
    assert index.cost(("a", 0)) == (1.5, 0)
    assert index.cost() == (3.5, 0)
    assert index.cost(("none", 0)) == (None, 0)
    append(output, record("c", cost=None))
    assert read_index(output).cost() == (3.5, 1)
    assert read_index(output).cost(("c", 0)) == (None, 1)


# Records -----------------------------------------------------------------------------


def test_a_new_record_has_all_keys_and_no_verdict() -> None:
    made = build(instance_id="a", status="workspace_error", instance={}, metadata={})
    assert set(made) == {
        "instance_id", "test_result", "instruction", "metadata", "history", "metrics", "error",
        "instance", "attempt", "n", "status", "messages", "tools", "resolved", "report",
    }  # fmt: skip
    assert made["resolved"] is None
    assert made["metrics"] == {"accumulated_cost": None}
    with pytest.raises(ValueError, match="'done' is no status"):
        build(instance_id="a", status="done", instance={}, metadata={})


def test_a_record_of_openhands_own_is_understood() -> None:
    data = {
        "instance_id": "a",
        "test_result": {"git_patch": "diff", "report": {"resolved": True}},
        "metrics": {"accumulated_cost": 1},
        "error": None,
    }
    old = Record(json.loads(json.dumps(data)))
    assert (old.key, old.attempt, old.status, old.resolved) == (("a", 0), 1, "finished", True)
    assert old.cost == 1.0
    assert Record({**data, "error": "boom"}).status == "agent_error"
    assert Record({**data, "test_result": {"git_patch": ""}}).status == "empty_patch"


@pytest.mark.parametrize("verdict", [True, False, None])
def test_a_verdict_replaces_an_earlier_one_wherever_it_is_read(verdict: bool | None) -> None:
    before = judged(record("a"), not verdict, {"resolved": not verdict, "old": 1})
    made = judged(before, verdict, {"resolved": "stale", "failed": ["x"]})
    assert Record(made).resolved is verdict
    assert made["report"] == made["test_result"]["report"] == {"resolved": verdict, "failed": ["x"]}
    assert made["test_result"]["git_patch"] == record("a")["test_result"]["git_patch"]
