"""The openai engine against a scripted server: retries, refusals, throttling, wire forms."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from spider_sdk.errors import (
    AuthError,
    EngineUnavailable,
    FatalJobError,
    NotSupported,
    PipelineError,
    RowError,
)
from spider_worker.engines import retry
from spider_worker.engines.base import Completion, EngineStats
from spider_worker.engines.openai import OpenAIEngine, check_sampling
from tests.support.openai_server import ScriptedServer


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@contextlib.asynccontextmanager
async def opened(base_url: str, **arguments: Any) -> AsyncIterator[OpenAIEngine]:
    engine = OpenAIEngine("tiny", base_url=base_url, **arguments)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def ask(
    server: ScriptedServer,
    text: str = "hello",
    *,
    params: Mapping[str, Any] | None = None,
    tools: Any = (),
    **arguments: Any,
) -> Completion:
    async def go() -> Completion:
        async with opened(server.base_url, **arguments) as engine:
            return await engine.complete(user(text), tools, params or {})

    return asyncio.run(go())


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST", 0.002)
    monkeypatch.setattr(retry, "_LONGEST", 0.05)


def test_reads_text_usage_and_reason(server: ScriptedServer) -> None:
    answer = ask(server, "one two three")
    assert answer.text == "echo: one two three"
    assert answer.finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 4)
    assert answer.reasoning is None
    assert answer.tool_calls is None


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "thinking"])
def test_reads_reasoning_under_each_name(server: ScriptedServer, field: str) -> None:
    assert ask(server, f"[[{field}]]").reasoning == "thought about it"


def test_reads_tool_calls_and_null_content(server: ScriptedServer) -> None:
    answer = ask(server, "[[tools]]", tools=[{"type": "function", "function": {"name": "f"}}])
    assert answer.text == ""
    assert answer.finish_reason == "tool_calls"
    assert answer.tool_calls is not None
    assert answer.tool_calls[0]["function"]["name"] == "look_up"
    assert ask(server, "[[null]]").text == ""


def test_sends_key_headers_parameters_and_extra_body(server: ScriptedServer) -> None:
    parameters = {"headers": {"X-Title": "spider"}, "extra_body": {"provider": {"order": ["a"]}}}
    params = {"temperature": 0.5, "min_p": 0.1, "extra_body": {"top_a": 1}}
    ask(server, api_key="secret", parameters=parameters, params=params)
    body, head = server.counts.last_body, server.counts.last_headers["raw"]
    assert "Authorization: Bearer secret" in head
    assert "X-Title: spider" in head
    assert body == {
        "model": "tiny",
        "messages": user("hello"),
        "provider": {"order": ["a"]},
        "temperature": 0.5,
        "min_p": 0.1,
        "top_a": 1,
    }


@pytest.mark.parametrize(
    "fault", ["500", "502", "503", "504", "429", "cut", "malformed", "408", "529"]
)
def test_transient_faults_are_repeated(server: ScriptedServer, fault: str) -> None:
    text = f"[[{fault}:2]]"
    assert ask(server, text).text == f"echo: {text}"
    assert server.stats()["prompts"] == {text: 3}


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("500", "http_500"), ("cut", "connection"), ("malformed", "malformed")],
)
def test_lasting_faults_become_a_row_error(server: ScriptedServer, fault: str, kind: str) -> None:
    with pytest.raises(RowError, match="3 tries") as caught:
        ask(server, f"[[{fault}]]", parameters={"max_retries": 2})
    assert caught.value.kind == kind
    assert caught.value.stage == "generation"
    assert server.counts.requests == 3


def test_a_hanging_request_times_out_and_is_repeated(server: ScriptedServer) -> None:
    answer = ask(server, "[[hang:1]]", parameters={"timeout": 0.2})
    assert answer.text == "echo: [[hang:1]]"
    with pytest.raises(RowError) as caught:
        ask(server, "[[hang]]", parameters={"timeout": 0.05, "max_retries": 1})
    assert caught.value.kind == "timeout"


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_a_row_error_at_once(server: ScriptedServer, status: int) -> None:
    with pytest.raises(RowError, match=f"answered {status}: scripted {status}"):
        ask(server, f"[[{status}]]")
    assert server.counts.requests == 1


def test_a_wrong_key_fails_everything_at_once(server: ScriptedServer) -> None:
    server.script.api_key = "right"

    async def many() -> list[Any]:
        async with opened(server.base_url, api_key="wrong", max_in_flight=2) as engine:
            calls = (engine.complete(user(f"row {n}"), (), {}) for n in range(50))
            return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(many())
    assert all(isinstance(result, AuthError) for result in results)
    assert server.counts.requests <= 4  # those in flight, not all that waited
    assert ask(server, api_key="right").text == "echo: hello"


def test_an_unknown_model_fails_the_job(server: ScriptedServer) -> None:
    server.script.models = "other"
    with pytest.raises(FatalJobError, match="does not know the model 'tiny'"):
        ask(server)


def test_404_after_a_success_is_a_row_error(server: ScriptedServer) -> None:
    async def go() -> None:
        async with opened(server.base_url) as engine:
            await engine.complete(user("fine"), (), {})
            await engine.complete(user("[[404]]"), (), {})

    with pytest.raises(RowError):
        asyncio.run(go())


def test_no_credit_fails_the_job(server: ScriptedServer) -> None:
    with pytest.raises(FatalJobError, match="credit"):
        ask(server, "[[402]]")


def test_redirects_are_not_followed(server: ScriptedServer) -> None:
    with pytest.raises(FatalJobError, match="base_url"):
        ask(server, "[[307]]")
    assert server.counts.requests == 1


def test_nothing_listening_is_engine_unavailable(server: ScriptedServer) -> None:
    async def go() -> None:
        url = "http://127.0.0.1:1/v1"
        async with opened(url, parameters={"max_retries": 1}) as engine:
            await engine.complete(user("x"), (), {})

    with pytest.raises(EngineUnavailable, match=r"Nothing answers at http://127\.0\.0\.1:1/v1"):
        asyncio.run(go())


def test_throttling_is_no_error_however_often(server: ScriptedServer) -> None:
    answer = ask(server, "[[429:20]]", parameters={"max_retries": 0})
    assert answer.text.startswith("echo")
    assert server.counts.requests == 21


def test_throttling_ends_when_nothing_succeeds_for_long(server: ScriptedServer) -> None:
    with pytest.raises(FatalJobError, match="No request has succeeded"):
        ask(server, "[[429]]", parameters={"patience": 0.3})


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(server: ScriptedServer, form: str) -> None:
    # A date has whole seconds: two from now is at least one.
    seconds, least = ("1", 1.0) if form == "seconds" else (None, 1.0)
    server.script.retry_after = seconds or email.utils.formatdate(time.time() + 2, usegmt=True)
    began = time.monotonic()
    ask(server, "[[429:1]]")
    assert time.monotonic() - began >= least


def test_retry_after_of_one_row_stalls_no_other(server: ScriptedServer) -> None:
    server.script.retry_after = "30"

    async def go() -> int:
        async with opened(server.base_url, max_in_flight=64) as engine:
            waiting = asyncio.ensure_future(engine.complete(user("[[429:1]]"), (), {}))
            calls = (engine.complete(user(f"row {n}"), (), {}) for n in range(300))
            done = await asyncio.wait_for(asyncio.gather(*calls), 20)
            assert not waiting.done()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            return len(done)

    assert asyncio.run(go()) == 300


def test_a_mixed_bag_of_faults_loses_nothing(server: ScriptedServer) -> None:
    script = server.script
    script.error_rate, script.throttle_rate = 0.03, 0.05
    script.malformed_rate = script.cut_rate = 0.02
    script.latency_ms = 2

    async def go() -> tuple[list[Completion], OpenAIEngine]:
        async with opened(server.base_url, max_in_flight=64) as engine:
            calls = (engine.complete(user(f"row {n}"), (), {}) for n in range(1000))
            return await asyncio.gather(*calls), engine

    answers, engine = asyncio.run(go())
    assert [a.text for a in answers] == [f"echo: row {n}" for n in range(1000)]
    assert engine.stats().throttled > 0
    assert engine.stats().retries == server.stats()["repeated"]
    assert engine.stats().limit == 64  # scattered refusals are no congestion


def test_a_request_that_waits_for_its_retry_is_not_in_flight(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_FIRST", 60.0)
    monkeypatch.setattr(retry, "_LONGEST", 60.0)

    async def go() -> None:
        async with opened(server.base_url) as engine:
            call = asyncio.create_task(engine.complete(user("[[500]]"), (), {}))
            async with asyncio.timeout(20):
                while not engine.stats().waiting:  # noqa: ASYNC110 - an engine tells nobody
                    await asyncio.sleep(0.01)
            assert engine.stats() == EngineStats(0, engine.stats().limit, retries=1, waiting=1)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            assert engine.stats().waiting == 0

    asyncio.run(go())


def test_finds_what_an_endpoint_bears(server: ScriptedServer) -> None:
    """256 wanted, 24 allowed: the limit comes down towards that (how near depends on when answers
    come), and all rows are served."""
    server.script.max_concurrent = 24
    server.script.latency_ms = 10

    async def go() -> OpenAIEngine:
        async with opened(server.base_url, max_in_flight=256) as engine:
            calls = (engine.complete(user(f"row {n}"), (), {}) for n in range(1500))
            await asyncio.gather(*calls)
            return engine

    engine = asyncio.run(go())
    assert 12 <= engine.stats().limit <= 96
    assert server.stats()["statuses"]["ok"] == 1500


def test_never_more_in_flight_than_allowed(server: ScriptedServer) -> None:
    server.script.latency_ms = 5
    server.script.error_rate = 0.1

    async def go() -> None:
        async with opened(server.base_url, max_in_flight=7) as engine:
            calls = (engine.complete(user(f"row {n}"), (), {}) for n in range(200))
            await asyncio.gather(*calls)

    asyncio.run(go())
    assert server.stats()["max_in_flight"] == 7


def test_a_cancelled_request_gives_its_place_back(server: ScriptedServer) -> None:
    async def go() -> None:
        async with opened(server.base_url, max_in_flight=2) as engine:
            hung = [asyncio.ensure_future(engine.complete(user("[[hang]]"), (), {})) for _ in "ab"]
            queued = [asyncio.ensure_future(engine.complete(user("x"), (), {})) for _ in "abc"]
            while server.counts.in_flight < 2:  # noqa: ASYNC110 - the state of another thread
                await asyncio.sleep(0.005)
            queued[1].cancel()
            for task in hung:
                task.cancel()
            await asyncio.gather(*hung, return_exceptions=True)
            first, second, third = await asyncio.gather(*queued, return_exceptions=True)
            assert isinstance(first, Completion)
            assert isinstance(second, asyncio.CancelledError)
            assert isinstance(third, Completion)
            assert engine.stats().in_flight == 0

    asyncio.run(go())


def test_private_and_metadata_addresses_are_refused(server: ScriptedServer) -> None:
    with pytest.raises(FatalJobError, match="SPIDER_ALLOW_PRIVATE_URLS"):
        ask(server, allow_private=False)
    assert server.counts.connections == 0

    async def metadata() -> None:
        async with opened("http://169.254.169.254/v1", allow_private=True) as engine:
            await engine.complete(user("x"), (), {})

    with pytest.raises(FatalJobError, match="metadata"):
        asyncio.run(metadata())


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"tensor_parallel_size": 4}, "tensor_parallel_size"),
        ({"max_retry": 4}, "did you mean 'max_retries'"),
        ({"timeout": "soon"}, "timeout"),
        ({"headers": ["a"]}, "headers"),
        ({"extra_body": {"n": 4}}, "duplications"),
    ],
)
def test_engine_arguments_are_refused_by_name(parameters: Mapping[str, Any], said: str) -> None:
    with pytest.raises(NotSupported, match=said):
        OpenAIEngine("tiny", base_url="http://x/v1", parameters=parameters)


def test_a_slip_of_the_pen_is_no_option_of_the_endpoint_s_own() -> None:
    for name, meant in (("temprature", "temperature"), ("max_token", "max_tokens")):
        with pytest.raises(NotSupported, match=f"did you mean '{meant}'.*extra_body"):
            check_sampling({name: 1})
    own = ("temperature", "min_tokens", "max_new_tokens", "top_n_sigma", "min_k", "enable_thinking")
    check_sampling(dict.fromkeys(own, 1))
    OpenAIEngine("tiny", base_url="http://x/v1", parameters={"extra_body": {"temprature": 1}})


def test_before_start_and_after_close_it_says_so(server: ScriptedServer) -> None:
    engine = OpenAIEngine("tiny", base_url=server.base_url)
    with pytest.raises(PipelineError, match="before start"):
        asyncio.run(engine.complete(user("x"), (), {}))
