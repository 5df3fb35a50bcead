"""Prompts in order, with a cursor, and what is held out."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from spider_sdk.errors import FatalJobError, RowError
from spider_worker.pipelines.onpolicy_train.prompts import (
    Cursor,
    Prompt,
    PromptStream,
    held_out_rows,
)
from spider_worker.pipelines.rows.prompts import Preparer
from spider_worker.pipelines.rows.reader import Reader
from spider_worker.testing import FakeSandbox, InMemorySource


def test_held_out_rows_are_spread_and_none_is_lost() -> None:
    assert held_out_rows(100, 4) == (12, 37, 62, 87)
    assert held_out_rows(8, None) == (4,)
    assert len(held_out_rows(10_000, None)) == 64
    assert held_out_rows(1, None) == ()
    assert held_out_rows(None, 3) == (0, 1, 2)
    assert held_out_rows(None, None, most=50) == (0, 1, 2, 3, 4)
    assert len(held_out_rows(None, None)) == 64
    with pytest.raises(FatalJobError, match="eval_examples holds out 8 rows, and the data has 8"):
        held_out_rows(8, 8)


class Stream:
    """A PromptStream over ``count`` rows ``{"q": "q<i>"}``."""

    def __init__(
        self, count: int = 10, epochs: int = 1, held_out: tuple[int, ...] = (), **options: Any
    ) -> None:
        self.errors: list[tuple[int, RowError]] = []
        row = options.pop("row", lambda index: {"q": f"q{index}"})
        stream = options.pop("stream", False)
        source = InMemorySource(row, count, stream=stream)
        pre = options.pop("pre", None)
        self.stream = PromptStream(
            Reader(source),
            None if pre is None else FakeSandbox(pre, "pre_processor"),
            Preparer("q", None),
            rows=None if stream else count,
            held_out=held_out,
            epochs=epochs,
            on_error=lambda index, error: self.errors.append((index, error)),
        )
        if self.stream._pre is not None:
            asyncio.run(self.stream._pre.start())

    def take_all(self, size: int, cursor: Cursor | None = None) -> list[list[Prompt]]:
        async def run() -> list[list[Prompt]]:
            batches = []
            at = cursor or Cursor()
            while batch := await self.stream.take(size, at):
                batches.append(batch)
                at = batch[-1].after
            await self.stream.close()
            return batches

        return asyncio.run(run())


def places(batches: list[list[Prompt]]) -> list[list[tuple[int, int]]]:
    return [[(prompt.epoch, prompt.index) for prompt in batch] for batch in batches]


def test_batches_run_over_epochs_and_leave_out_what_is_held_out() -> None:
    found = places(Stream(4, epochs=2, held_out=(1,)).take_all(2))
    assert found == [[(0, 0), (0, 2)], [(0, 3), (1, 0)], [(1, 2), (1, 3)]]


def test_a_cursor_goes_on_where_another_stream_stopped() -> None:
    whole = places(Stream(7, epochs=3, held_out=(2,)).take_all(4))
    first = Stream(7, epochs=3, held_out=(2,)).take_all(4)
    rest = places(Stream(7, epochs=3, held_out=(2,)).take_all(4, first[1][-1].after))
    assert places(first[:2]) + rest == whole


def test_rows_that_make_no_prompt_are_counted_and_the_first_is_told() -> None:
    def pre(row: dict[str, str]) -> Any:
        number = int(row["q"][1:])
        if number % 4 == 1:
            return None
        if number % 4 == 2:
            raise ValueError("bad row")
        return row["q"] + "?"

    stream = Stream(8, pre=pre)
    texts = [prompt.prepared.prompt for batch in stream.take_all(3) for prompt in batch]
    assert texts == ["q0?", "q3?", "q4?", "q7?"]
    assert (stream.stream.errors, stream.stream.dropped) == (2, 2)
    assert [(index, error.message) for index, error in stream.errors] == [(2, "bad row")]


def test_data_without_a_single_prompt_is_an_error_and_not_an_endless_run() -> None:
    with pytest.raises(FatalJobError, match="no row of the data makes a prompt: 3 went wrong"):
        Stream(3, epochs=10, row=lambda index: {"other": index}).take_all(2)


def test_a_stream_of_unknown_length_ends_where_its_rows_do() -> None:
    found = places(Stream(5, epochs=2, held_out=(0, 1), stream=True).take_all(2))
    assert found == [[(0, 2), (0, 3)], [(0, 4), (1, 2)], [(1, 3), (1, 4)]]


def test_a_stream_that_is_held_out_as_a_whole_is_said_to_be() -> None:
    with pytest.raises(FatalJobError, match=r"first 2 of the stream .*eval_examples"):
        Stream(2, held_out=(0, 1), stream=True).take_all(2)


def test_held_out_prompts_are_those_rows() -> None:
    stream = Stream(20, held_out=(3, 4, 11))
    prompts = asyncio.run(stream.stream.held_out())
    assert [prompt.index for prompt in prompts] == [3, 4, 11]
