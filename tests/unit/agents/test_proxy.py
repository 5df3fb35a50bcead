"""The proxy over a real socket: whose key, whose caps, and what is counted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from spider_worker.agents.proxy import LlmProxy, Prices, Ticket
from tests.support.agent_model import AgentModel, running_model

PRICES = Prices(0.01, 0.02)
COST = 100 * 0.01 + 10 * 0.02  # of one scripted call
Call = Callable[[LlmProxy], Awaitable[Any]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture
def model() -> Iterator[AgentModel]:
    with running_model({"talk": [{"text": "one"}]}) as model:
        yield model


def through(base_url: str, tmp_path: Path, body: Call, prices: Prices = PRICES) -> Any:
    async def main() -> Any:
        socket = tmp_path / "s"
        async with LlmProxy(base_url, "the-real-key", socket=socket, prices=prices) as proxy:
            return await body(proxy)

    return asyncio.run(main())


async def ask(proxy: LlmProxy, key: str, **body: Any) -> tuple[int, Any]:
    connector = aiohttp.UnixConnector(path=str(proxy.socket))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.post(
            "http://proxy/v1/chat/completions",
            json={"model": "m", "messages": [{"role": "user", "content": "hi"}], **body},
            headers={"Authorization": f"Bearer {key}"},
        ) as answer,
    ):
        return answer.status, await answer.json(content_type=None)


def test_a_ticket_is_good_for_its_episode_alone(model: AgentModel, tmp_path: Path) -> None:
    async def body(proxy: LlmProxy) -> list[int]:
        ticket = proxy.issue()
        statuses = [(await ask(proxy, key))[0] for key in (ticket.key, "the-real-key", "")]
        proxy.revoke(ticket)
        return [*statuses, (await ask(proxy, ticket.key))[0]]

    assert through(model.base_url, tmp_path, body) == [200, 401, 401, 401]
    assert model.keys == ["Bearer the-real-key"]


def test_calls_and_dollars_are_counted_and_capped(model: AgentModel, tmp_path: Path) -> None:
    async def body(proxy: LlmProxy) -> Ticket:
        ticket = proxy.issue(max_calls=5, max_cost=1.5 * COST)
        for wanted in (200, 200, 403):
            status, answer = await ask(proxy, ticket.key)
            assert status == wanted
        assert "the cap of $" in answer["error"]["message"]
        other = proxy.issue(max_calls=1)
        assert [(await ask(proxy, other.key))[0] for _ in range(2)] == [200, 403]
        return ticket

    ticket = through(model.base_url, tmp_path, body)
    assert (ticket.calls, ticket.answers) == (2, 2)
    assert (ticket.prompt_tokens, ticket.completion_tokens) == (200, 20)
    assert ticket.cost == pytest.approx(2 * COST)


def test_what_nobody_counts_is_not_spent_under_a_cap(tmp_path: Path) -> None:
    turns = [{"text": "one", "usage": None}]

    async def body(proxy: LlmProxy) -> Ticket:
        ticket = proxy.issue(max_cost=10.0)
        assert (await ask(proxy, ticket.key))[0] == 200
        status, answer = await ask(proxy, ticket.key)
        assert status == 403
        assert "not known what an earlier call cost" in answer["error"]["message"]
        return ticket

    with running_model({"talk": turns}) as model:
        assert through(model.base_url, tmp_path, body).cost is None


def test_a_cost_without_a_price_is_unknown(model: AgentModel, tmp_path: Path) -> None:
    async def body(proxy: LlmProxy) -> Ticket:
        ticket = proxy.issue()
        await ask(proxy, ticket.key)
        return ticket

    ticket = through(model.base_url, tmp_path, body, Prices(0.01, None))
    assert ticket.cost is None
    assert ticket.prompt_tokens == 100


def test_an_endpoint_that_is_not_there_is_said(tmp_path: Path) -> None:
    async def body(proxy: LlmProxy) -> tuple[Ticket, int, Any]:
        ticket = proxy.issue()
        return (ticket, *await ask(proxy, ticket.key))

    ticket, status, answer = through("http://127.0.0.1:9/v1", tmp_path, body)
    assert status == 503, "which the agent's SDK waits for"
    assert "could not be reached" in answer["error"]["message"]
    assert (ticket.failures, ticket.answers) == (1, 0)


def test_a_gateway_whose_server_is_away_is_waited_for_alike(tmp_path: Path) -> None:
    async def body(proxy: LlmProxy) -> int:
        return (await ask(proxy, proxy.issue().key))[0]

    with running_model({"talk": [{"status": 502}]}) as model:
        assert through(model.base_url, tmp_path, body) == 503


@contextlib.asynccontextmanager
async def endpoint(handler: Handler) -> AsyncIterator[str]:
    """An endpoint of one's own; its address."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


def with_endpoint(handler: Handler, tmp_path: Path, body: Call) -> Any:
    async def main() -> Any:
        async with (
            endpoint(handler) as base,
            LlmProxy(base, "the-real-key", socket=tmp_path / "s", prices=PRICES) as proxy,
        ):
            return await body(proxy)

    return asyncio.run(main())


class Slow:
    """An endpoint whose answers wait for ``gate``. ``at_once`` is how many it had at a time."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.asked = asyncio.Event()
        self.live = self.at_once = 0

    async def answer(self, _: web.Request) -> web.Response:
        self.live += 1
        self.at_once = max(self.live, self.at_once)
        self.asked.set()
        await self.gate.wait()
        self.live -= 1
        return web.json_response({"usage": {"prompt_tokens": 100, "completion_tokens": 10}})


async def hang_up(proxy: LlmProxy, ticket: Ticket, slow: Slow) -> None:
    """Ask, and do not wait for the answer."""
    asking = asyncio.create_task(ask(proxy, ticket.key))
    await slow.asked.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


def test_a_call_that_the_agent_gave_up_on_is_counted_when_it_ends(tmp_path: Path) -> None:
    slow = Slow()

    async def body(proxy: LlmProxy) -> Ticket:
        ticket = proxy.issue()
        await hang_up(proxy, ticket, slow)
        slow.gate.set()
        await proxy.settle(ticket, 30.0)
        assert (await ask(proxy, ticket.key))[0] == 401, "it is revoked"
        return ticket

    ticket = with_endpoint(slow.answer, tmp_path, body)
    assert ticket.cost == pytest.approx(COST)
    assert (ticket.answers, ticket.prompt_tokens) == (1, 100)


def test_what_a_call_cost_that_is_broken_off_is_not_known(tmp_path: Path) -> None:
    slow = Slow()

    async def body(proxy: LlmProxy) -> Ticket:
        ticket = proxy.issue(max_cost=10.0)
        await hang_up(proxy, ticket, slow)
        await proxy.settle(ticket, 0.0)
        slow.gate.set()
        return ticket

    ticket = with_endpoint(slow.answer, tmp_path, body)
    assert (ticket.cost, ticket.answers, ticket.under_way) == (None, 0, set())


def test_a_proxy_that_is_closed_leaves_no_call_behind(tmp_path: Path) -> None:
    slow = Slow()

    async def body(proxy: LlmProxy) -> Ticket:
        ticket = proxy.issue()
        await hang_up(proxy, ticket, slow)
        await proxy.close()
        slow.gate.set()
        return ticket

    ticket = with_endpoint(slow.answer, tmp_path, body)
    assert (ticket.under_way, ticket.cost) == (set(), None)


def test_calls_under_a_cap_on_money_are_made_one_by_one(tmp_path: Path) -> None:
    slow = Slow()
    slow.gate.set()

    async def body(proxy: LlmProxy) -> Ticket:
        ticket = proxy.issue(max_cost=1.5 * COST)
        answers = await asyncio.gather(*(ask(proxy, ticket.key) for _ in range(20)))
        assert sorted(status for status, _ in answers) == [200, 200] + [403] * 18
        return ticket

    assert with_endpoint(slow.answer, tmp_path, body).cost == pytest.approx(2 * COST)
    assert slow.at_once == 1


def test_without_one_they_are_made_side_by_side_up_to_their_number(tmp_path: Path) -> None:
    async def body(proxy: LlmProxy) -> list[int]:
        ticket = proxy.issue(max_calls=3)
        asking = [asyncio.create_task(ask(proxy, ticket.key)) for _ in range(8)]
        while sum(task.done() for task in asking) < 5 or slow.live < 3:  # noqa: ASYNC110
            await asyncio.sleep(0)
        slow.gate.set()
        return sorted([status for status, _ in await asyncio.gather(*asking)])

    slow = Slow()
    assert with_endpoint(slow.answer, tmp_path, body) == [200] * 3 + [403] * 5
    assert slow.at_once == 3


def test_failures_are_no_calls_and_have_an_end_of_their_own(tmp_path: Path) -> None:
    made: list[int] = []

    async def busy(_: web.Request) -> web.Response:
        made.append(429)
        return web.json_response({}, status=429)

    async def body(proxy: LlmProxy) -> None:
        ticket = proxy.issue(max_calls=2)
        while (await ask(proxy, ticket.key))[0] == 429:
            pass
        assert (
            "120 calls of the model have failed"
            in (await ask(proxy, ticket.key))[1]["error"]["message"]
        )
        assert ticket.failures == len(made) == 120

    with_endpoint(busy, tmp_path, body)


def test_an_endpoint_that_repeats_the_key_is_not_heard_out(tmp_path: Path) -> None:
    async def telling(request: web.Request) -> web.Response:
        key = request.headers["Authorization"].removeprefix("Bearer ")
        said = {"error": {"message": f"no such key: {key}"}}
        return web.json_response(said, status=401, headers={"x-request-id": f"r-{key}"})

    async def body(proxy: LlmProxy) -> None:
        ticket = proxy.issue()
        connector = aiohttp.UnixConnector(path=str(proxy.socket))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post(
                "http://proxy/v1/chat/completions",
                json={},
                headers={"Authorization": f"Bearer {ticket.key}"},
            ) as answer,
        ):
            text = await answer.text()
            assert "no such key: [key]" in text
            assert answer.headers["x-request-id"] == "r-[key]"
            assert "the-real-key" not in text + str(answer.headers) + str(ticket.refused)

    with_endpoint(telling, tmp_path, body)


def test_a_stream_passes_and_is_counted(tmp_path: Path) -> None:
    async def main() -> tuple[Ticket, str]:
        seen: list[Any] = []

        async def stream(request: web.Request) -> web.StreamResponse:
            seen.append(await request.json())
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(b'data: {"choices": [{"delta": {"content": "on"}}]}\n\n')
            await response.write(
                b'data: {"usage": {"prompt_tokens": 7, "completion_tokens": 3}}\n\ndata: [DONE]\n\n'
            )
            return response

        app = web.Application()
        app.router.add_post("/v1/chat/completions", stream)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        base = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        async with LlmProxy(base, None, socket=tmp_path / "s", prices=PRICES) as proxy:
            ticket = proxy.issue()
            connector = aiohttp.UnixConnector(path=str(proxy.socket))
            async with (
                aiohttp.ClientSession(connector=connector) as session,
                session.post(
                    "http://proxy/v1/chat/completions",
                    json={"messages": [], "stream": True},
                    headers={"Authorization": f"Bearer {ticket.key}"},
                ) as answer,
            ):
                text = await answer.text()
        await runner.cleanup()
        assert seen[0]["stream_options"] == {"include_usage": True}
        return ticket, text

    ticket, text = asyncio.run(main())
    assert '"content": "on"' in text
    assert text.endswith("data: [DONE]\n\n")
    assert (ticket.prompt_tokens, ticket.completion_tokens) == (7, 3)
    assert ticket.cost == pytest.approx(7 * 0.01 + 3 * 0.02)
