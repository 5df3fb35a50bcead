"""Pre- and post-processors."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from spider_worker.testing import FakeEngine, InMemorySource
from tests.unit.offline_gen.jobs import Setup, rows


def test_what_a_pre_processor_may_return(tmp_path: Path) -> None:
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    answers: list[Any] = [
        "text",
        conversation,
        {"prompt": "p", "extra": 1},
        {"messages": conversation, "prompt": "kept", "number": "new"},
        {"question": "changed"},
        None,
        7,
        [],
        {"prompt": 3},
    ]
    engine = FakeEngine()
    setup = Setup(tmp_path, engine=engine, source=InMemorySource(rows(len(answers))))
    setup.pre = lambda row: answers[row["number"]]
    done = setup.go()
    records = {record["index"]: record for record in done.records()}
    assert records[0]["prompt"] == "text"
    assert records[1]["messages"] == conversation
    assert (records[2]["prompt"], records[2]["extra"]) == ("p", 1)
    assert (records[3]["messages"], records[3]["prompt"]) == (conversation, "kept")
    assert records[3]["number"] == "new"
    assert (records[4]["prompt"], records[4]["question"]) == ("changed", "changed")
    assert 5 not in records
    for index, shape in ((6, "of type int"), (7, "an empty list"), (8, "of type int")):
        assert records[index]["error"]["stage"] == "pre_processor"
        assert shape in records[index]["error"]["message"]
        assert records[index]["messages"] is None
    assert done.counters()["rows_dropped"] == 1
    assert len(engine.asked) == 5


def test_a_pre_processor_that_raises_costs_its_row_with_the_traceback(tmp_path: Path) -> None:
    def pre(row: dict[str, Any]) -> str:
        return f"{1 / (row['number'] - 4)}"

    done = Setup(tmp_path, pre=pre).go()
    (bad,) = [record for record in done.records() if record["error"]]
    assert bad["id"] == "4-0"
    assert bad["error"]["type"] == "ZeroDivisionError"
    assert "in pre" in bad["error"]["traceback"]
    assert bad["number"] == 4


def test_without_a_pre_processor_a_field_that_is_no_prompt_is_an_error_row(tmp_path: Path) -> None:
    source = InMemorySource(
        [{"question": "fine"}, {"question": 5}, {"question": None}, {"other": 1}]
    )
    done = Setup(tmp_path, source=source).go()
    errors = [record["error"] for record in done.records()]
    assert errors[0] is None
    assert [error["stage"] for error in errors[1:]] == ["source"] * 3
    assert "of type int" in errors[1]["message"]
    assert "null" in errors[2]["message"]
    assert "it has other" in errors[3]["message"]


def test_a_post_processor_replaces_drops_and_fails_rows(tmp_path: Path) -> None:
    def post(row: dict[str, Any]) -> Any:
        return {
            0: {"id": "stolen", "answer": row["completion"], "q": row["question"]},
            1: None,
            2: "no dict",
            3: {"error": "I say no"},
            5: {"error": {"message": "nor this"}},
        }.get(row["index"], row)

    def checked(row: dict[str, Any]) -> Any:
        if row["index"] == 9:
            raise ValueError("bad row")
        return post(row)

    done = Setup(tmp_path, post=checked).go()
    records = {record["index"]: record for record in done.records()}
    assert records[0] == {"id": "0-0", "index": 0, "sample": 0, "answer": "echo: q0", "q": "q0"}
    assert 1 not in records
    assert records[2]["error"]["type"] == "bad_answer"
    assert records[3]["error"]["message"] == "I say no"
    assert records[5]["error"]["message"] == "nor this"
    assert records[4]["completion"] == "echo: q4"
    # Generated, paid for, and kept.
    assert records[9]["completion"] == "echo: q9"
    assert records[9]["error"]["type"] == "ValueError"
    assert done.counters()["rows_ok"] == 5
    assert done.counters()["rows_error"] == 4
    assert done.counters()["rows_dropped"] == 1
    assert done.counters()["completion_tokens"] == 20


def test_a_slow_post_processor_holds_up_no_request(tmp_path: Path) -> None:
    asked_when_first_finished: list[int] = []
    engine = FakeEngine(capacity=4)
    gate = asyncio.Event()

    async def main() -> None:
        setup = Setup(tmp_path, engine=engine, source=InMemorySource(rows(200)), shard_size=200)
        setup.post = lambda row: row
        pipeline = setup.pipeline()
        from spider_worker.testing import FakeSandbox

        plain = FakeSandbox.call

        async def held(self: FakeSandbox, batch: Any) -> Any:
            await gate.wait()
            asked_when_first_finished.append(len(engine.asked))
            return await plain(self, batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeSandbox, "call", held)
            from spider_worker.testing import run_job_locally

            job = asyncio.create_task(run_job_locally(pipeline, setup.context()))
            async with asyncio.timeout(20):
                while len(engine.asked) < 200:  # noqa: ASYNC110 - asked is a list
                    await asyncio.sleep(0.005)
                gate.set()
                await job

    asyncio.run(main())
    assert asked_when_first_finished[0] == 200


def test_a_processor_that_drops_everything_is_no_success(tmp_path: Path) -> None:
    engine = FakeEngine()
    done = Setup(tmp_path, engine=engine, pre=lambda row: None).go()
    assert done.result.error == "no good row: the processors dropped all 10"
    assert engine.asked == []


def test_batches_grow_for_a_fast_function_and_shrink_for_a_slow_one() -> None:
    from spider_worker.pipelines.rows.reader import BatchSizer

    sizer = BatchSizer()
    for _ in range(10):
        sizer.took(sizer.size, 0.001)
    assert sizer.size == 256
    sizer.took(3, 0.001)  # a short batch says nothing
    for _ in range(20):
        sizer.took(sizer.size, 5.0)
    assert sizer.size == 1


def test_a_unit_lets_no_other_begin_while_too_much_waits_for_the_function() -> None:
    from spider_worker.pipelines.offline_gen.post import Backlog

    async def main() -> None:
        backlog = Backlog()
        backlog.add(Backlog.MOST + 1)
        waiting = asyncio.create_task(backlog.short())
        await asyncio.sleep(0)
        assert not waiting.done()
        backlog.add(-1)
        await asyncio.wait_for(waiting, 10)

    asyncio.run(main())
