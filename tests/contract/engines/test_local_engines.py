"""What the engines that run a model in this process add to the contract."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.errors import EngineUnavailable, NotSupported, PipelineError, RowError
from spider_worker.engines.base import Completion, Engine
from spider_worker.engines.transformers import TransformersEngine
from tests.contract.engines.conftest import KINDS

USER = [{"role": "user", "content": "the words of many people"}]


@pytest.fixture(params=KINDS[2:])
def local(request: pytest.FixtureRequest) -> Engine:
    built: Engine = request.getfixturevalue(f"{request.param}_engine")
    return built


def test_max_tokens_ends_a_row_with_length(local: Engine, run: Any) -> None:
    answer = run(local.complete(USER, (), {"max_tokens": 5, "seed": 1}))
    assert answer.usage.completion_tokens <= 5
    if answer.usage.completion_tokens == 5:
        assert answer.finish_reason == "length"


def test_a_stop_text_ends_a_row_and_is_cut_off(local: Engine, run: Any) -> None:
    greedy = {"max_tokens": 24, "temperature": 0}
    whole = run(local.complete(USER, (), greedy))
    stop = whole.text[len(whole.text) // 2 :][:3]
    cut = run(local.complete(USER, (), {**greedy, "stop": stop}))
    assert stop
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.usage.completion_tokens < whole.usage.completion_tokens


def test_a_seed_gives_the_same_sample_whatever_else_runs(local: Engine, run: Any) -> None:
    params = {"max_tokens": 12, "temperature": 1.0, "seed": 7}

    async def alone_and_in_company() -> tuple[Completion, Completion, Completion]:
        alone = await local.complete(USER, (), params)
        others = [
            local.complete([{"role": "user", "content": f"row {n}"}], (), {"max_tokens": 12})
            for n in range(7)
        ]
        company, *_ = await asyncio.gather(local.complete(USER, (), params), *others)
        other_seed = await local.complete(USER, (), {**params, "seed": 8})
        return alone, company, other_seed

    alone, company, other = run(alone_and_in_company())
    assert alone.text == company.text
    assert alone.text != other.text


def test_padding_is_not_seen(transformers_engine: Engine, run: Any) -> None:
    """Prompts of different lengths in one batch get what they get alone."""
    greedy = {"max_tokens": 12, "temperature": 0}
    prompts = [[{"role": "user", "content": " ".join(["people"] * n)}] for n in (1, 5, 14, 30)]

    async def together_and_alone() -> tuple[list[str], list[str]]:
        together = await asyncio.gather(
            *(transformers_engine.complete(p, (), greedy) for p in prompts)
        )
        alone = [await transformers_engine.complete(p, (), greedy) for p in prompts]
        return [a.text for a in together], [a.text for a in alone]

    together, alone = run(together_and_alone())
    assert together == alone


def test_without_a_seed_samples_differ(local: Engine, run: Any) -> None:
    async def several() -> set[str]:
        calls = (local.complete(USER, (), {"max_tokens": 12}) for _ in range(6))
        return {answer.text for answer in await asyncio.gather(*calls)}

    assert len(run(several())) > 1


def test_a_prompt_beyond_the_context_is_a_row_error(local: Engine, run: Any) -> None:
    long = [{"role": "user", "content": "word " * 3000}]
    with pytest.raises(RowError, match="context") as caught:
        run(local.complete(long, (), {"max_tokens": 4}))
    assert caught.value.stage == "generation"
    assert caught.value.kind == "prompt_too_long"


def test_messages_that_the_template_refuses_are_a_row_error(local: Engine, run: Any) -> None:
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(RowError, match="other than text"):
        run(local.complete(image, (), {"max_tokens": 4}))
    parts = [{"role": "user", "content": [{"type": "text", "text": "the words"}]}]
    assert isinstance(run(local.complete(parts, (), {"max_tokens": 4})), Completion)


def test_tools_are_refused_by_name(local: Engine, run: Any) -> None:
    with pytest.raises(NotSupported, match="tools"):
        run(local.complete(USER, [{"name": "look_up"}], {}))


def test_a_model_that_is_not_there_is_said_so(run: Any, tmp_path: Path) -> None:
    engine = TransformersEngine(str(tmp_path / "nothing"))
    with pytest.raises(EngineUnavailable, match="could not start"):
        run(engine.start())
    run(engine.close())


def test_close_answers_what_still_runs(run: Any, tiny_model: Path) -> None:
    engine = TransformersEngine(str(tiny_model))
    run(engine.start())

    async def close_under_way() -> Any:
        tasks = [
            asyncio.ensure_future(engine.complete(USER, (), {"seed": n, "max_tokens": 900}))
            for n in range(4)
        ]
        while not engine._pending:  # noqa: ASYNC110 - the state of another thread
            await asyncio.sleep(0.01)
        await engine.close()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = run(close_under_way())
    assert all(isinstance(r, (PipelineError, Completion)) for r in results)
    with pytest.raises(PipelineError, match="after close"):
        run(engine.complete(USER, (), {}))


def test_a_bad_parameter_on_one_row_harms_no_other(local: Engine, run: Any) -> None:
    """Names and values are checked before a job starts; should one come through, the engine
    lives on."""

    async def mixed() -> list[Any]:
        calls = [
            local.complete(USER, (), {"max_tokens": 4, "temperature": temperature})
            for temperature in (0.5, -1, 0.5)
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    good, bad, also_good = run(mixed())
    assert isinstance(bad, (RowError, NotSupported))
    assert isinstance(good, Completion)
    assert isinstance(also_good, Completion)
    assert isinstance(run(local.complete(USER, (), {"max_tokens": 4})), Completion)
