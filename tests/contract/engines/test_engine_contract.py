"""What every engine must do, on the shipped fake and on the real ones."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from spider_worker.engines.base import Completion, Engine

SHORT = {"max_tokens": 8, "temperature": 0.0}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_answers_with_text_reason_and_usage(engine: Engine, run: Any) -> None:
    answer = run(engine.complete(user("count the words"), (), SHORT))
    assert isinstance(answer, Completion)
    assert isinstance(answer.text, str)
    assert answer.finish_reason in ("stop", "length")
    assert answer.usage.prompt_tokens is None or answer.usage.prompt_tokens > 0
    assert answer.usage.completion_tokens is None or answer.usage.completion_tokens > 0


def test_each_of_many_gets_its_own_answer(engine: Engine, run: Any) -> None:
    """More at once than the engine wants in flight; greedy, so that answers can be compared."""
    prompts = [f"number {n} of them" for n in range(engine.info.capacity + 20)]

    async def both() -> tuple[list[Completion], list[Completion]]:
        many = await asyncio.gather(*(engine.complete(user(p), (), SHORT) for p in prompts))
        few = [await engine.complete(user(p), (), SHORT) for p in prompts[:5]]
        return many, few

    many, few = run(both())
    assert len(many) == len(prompts)
    assert [len(m.text) > 0 for m in many[:5]] == [len(f.text) > 0 for f in few]
    if engine.info.name in ("fake", "openai"):
        assert [m.text for m in many] == [f"echo: {p}" for p in prompts]
    else:
        # Rounding may differ between batch shapes; where a prompt goes may not.
        assert [m.usage.prompt_tokens for m in many[:5]] == [f.usage.prompt_tokens for f in few]


def test_says_what_is_in_flight(engine: Engine, run: Any) -> None:
    async def during() -> tuple[int, int]:
        tasks = [
            asyncio.ensure_future(engine.complete(user(f"row {n}"), (), SHORT)) for n in range(4)
        ]
        await asyncio.sleep(0)
        now = engine.stats().in_flight
        await asyncio.gather(*tasks)
        return now, engine.stats().in_flight

    assert run(during()) == (4, 0)
    assert engine.stats().limit >= 1
    assert engine.info.capacity >= 1


def test_a_cancelled_request_leaves_the_others_alone(engine: Engine, run: Any) -> None:
    async def cancel_one() -> list[Any]:
        tasks = [
            asyncio.ensure_future(engine.complete(user(f"row {n}"), (), SHORT)) for n in range(6)
        ]
        await asyncio.sleep(0)
        tasks[2].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = run(cancel_one())
    assert isinstance(results[2], asyncio.CancelledError)
    assert all(isinstance(r, Completion) for n, r in enumerate(results) if n != 2)
    assert engine.stats().in_flight == 0


def test_close_may_be_called_before_start(engine: Engine, run: Any) -> None:
    """A runner closes whatever it built, also when starting failed."""
    kind = type(engine)
    if engine.info.name == "openai":
        fresh: Engine = kind("tiny", base_url="http://127.0.0.1:1/v1")  # type: ignore[call-arg]
    elif engine.info.name == "fake":
        fresh = kind()
    else:
        fresh = kind("nobody/nothing")  # type: ignore[call-arg]
    run(fresh.close())
    run(fresh.close())


@pytest.mark.parametrize("text", ["", "é你好 🕷️", "line\nline\t\"quoted\" \\ 'x'"])
def test_any_text_goes_through(engine: Engine, run: Any, text: str) -> None:
    assert isinstance(run(engine.complete(user(text), (), SHORT)), Completion)
