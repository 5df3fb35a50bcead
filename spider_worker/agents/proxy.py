"""The proxy between agents and an OpenAI-compatible endpoint: it adds the key and counts the money.

An agent's process holds a *ticket*, which is worth nothing outside: with it as its key the agent
speaks to a Unix socket here, and so may whatever it runs. A ticket has caps, on calls and on
dollars, and ends with its episode. Retries are the agent's SDK's; the proxy makes none. A call
that the agent gives up on is billed all the same: it goes on here until it can be counted.
"""

from __future__ import annotations

__all__ = ["LlmProxy", "Prices", "Ticket"]

import asyncio
import contextlib
import dataclasses
import json
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Self

import aiohttp
from aiohttp import web

_PATHS: Final = ("chat/completions", "completions", "responses")
_BODY_BYTES: Final = 256 << 20
_CONNECT_SECONDS: Final = 30.0
#: Said of an endpoint that is not there: the agent's SDK waits for minutes then, as it does not
#: for a bad gateway.
_AWAY: Final = 503
#: Failed calls that a ticket has beside those that count: a busy endpoint refuses many.
_SPARE_FAILURES: Final = 100
_FAILURES_A_CALL: Final = 10
#: A shorter key is one of those that a server of one's own takes for none, and a word like others.
_SECRET_LENGTH: Final = 8
#: Of the endpoint's answer, what an agent's SDK reads.
_HEADERS: Final = ("Content-Type", "Retry-After", "x-request-id")


@dataclasses.dataclass(frozen=True)
class Prices:
    """Dollars a token. None: unknown, and then so is what a call costs."""

    input: float | None = None
    output: float | None = None

    def of(self, usage: Mapping[str, Any]) -> float | None:
        """What a call cost, None where a price or the endpoint's count is missing."""
        taken = usage.get("prompt_tokens", usage.get("input_tokens"))
        given = usage.get("completion_tokens", usage.get("output_tokens"))
        if self.input is None or self.output is None or taken is None or given is None:
            return None
        return float(taken) * self.input + float(given) * self.output


@dataclasses.dataclass(eq=False)
class Ticket:
    """One episode's right to call the model. ``cost`` is in dollars and None once a call's is not
    known; ``max_cost`` and ``max_calls``, of calls that were answered, None are no cap. A call
    that is under way may go over ``max_cost``; none begins after or beside it."""

    key: str
    max_calls: int | None = None
    max_cost: float | None = None
    calls: int = 0
    answers: int = 0
    failures: int = 0
    refused: str | None = None  #: what the endpoint said when it last refused the key
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = 0.0
    closed: bool = False
    under_way: set[asyncio.Task[web.StreamResponse]] = dataclasses.field(default_factory=set)
    turn: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)  #: with a cap on money

    def refusal(self) -> str | None:
        """Why no further call is allowed, None if one is."""
        if self.closed:
            return "this episode has ended"
        if self.max_calls is not None:
            if self.answers + len(self.under_way) >= self.max_calls:
                return f"the cap of {self.max_calls} calls of the model is reached"
            if self.failures >= _FAILURES_A_CALL * self.max_calls + _SPARE_FAILURES:
                return f"{self.failures} calls of the model have failed, and no more are made"
        if self.max_cost is not None and self.cost is None:
            return "there is a cap on money, and it is not known what an earlier call cost"
        if self.max_cost is not None and self.cost is not None and self.cost >= self.max_cost:
            return f"the cap of ${self.max_cost:.4f} is reached"
        return None

    def count(self, usage: Mapping[str, Any], prices: Prices) -> None:
        cost = prices.of(usage)
        self.cost = None if cost is None or self.cost is None else self.cost + cost
        self.prompt_tokens += int(usage.get("prompt_tokens", usage.get("input_tokens", 0)) or 0)
        self.completion_tokens += int(
            usage.get("completion_tokens", usage.get("output_tokens", 0)) or 0
        )


class LlmProxy:
    """``base_url`` is the endpoint's, ``key`` its key (None: it wants none). ``connector`` makes
    what connections go through (None: aiohttp's own); ``timeout`` seconds bound one call."""

    def __init__(
        self,
        base_url: str,
        key: str | None,
        *,
        socket: Path,
        prices: Prices = Prices(),
        timeout: float = 3600.0,
        connector: Callable[[], aiohttp.BaseConnector] | None = None,
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._key = key
        self.socket = socket
        self._prices = prices
        self._timeout = aiohttp.ClientTimeout(total=timeout, connect=_CONNECT_SECONDS)
        self._connector = connector
        self._tickets: dict[str, Ticket] = {}
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None
        self._under_way: set[asyncio.Task[web.StreamResponse]] = set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(
            timeout=self._timeout,
            connector=self._connector() if self._connector else None,
            auto_decompress=True,
        )
        app = web.Application(client_max_size=_BODY_BYTES)
        for path in _PATHS:
            app.router.add_post(f"/v1/{path}", self._call)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await self._runner.setup()
        self.socket.unlink(missing_ok=True)
        await web.UnixSite(self._runner, str(self.socket)).start()

    async def close(self) -> None:
        """End it, and calls that are under way. Idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await _break_off(self._under_way)
            await runner.cleanup()
        session, self._session = self._session, None
        if session is not None:
            await session.close()
        self.socket.unlink(missing_ok=True)

    def issue(self, *, max_calls: int | None = None, max_cost: float | None = None) -> Ticket:
        """A ticket for one episode. Give it back with ``revoke``."""
        ticket = Ticket(f"episode-{secrets.token_hex(16)}", max_calls, max_cost)
        self._tickets[ticket.key] = ticket
        return ticket

    def revoke(self, ticket: Ticket) -> None:
        """No further call begins with it."""
        ticket.closed = True
        self._tickets.pop(ticket.key, None)

    async def settle(self, ticket: Ticket, seconds: float) -> None:
        """Revoke a ticket and wait for what is under way with it to be counted. A call that takes
        longer than ``seconds`` is broken off, and the ticket's cost is not known then."""
        self.revoke(ticket)
        calls = set(ticket.under_way)
        if calls:
            await asyncio.wait(calls, timeout=seconds)
        await _break_off(calls)

    async def _call(self, request: web.Request) -> web.StreamResponse:
        held = request.headers.get("Authorization", "").removeprefix("Bearer ")
        ticket = self._tickets.get(held)
        if ticket is None:
            return _refuse(401, "no episode that is under way has this key")
        if (why := ticket.refusal()) is not None:
            return _refuse(403, why)
        body = await request.read()
        capped = ticket.max_cost is not None
        if capped:
            # Beside one whose cost is not known yet, nobody could tell what is left.
            await ticket.turn.acquire()
        if (why := ticket.refusal()) is not None:
            if capped:
                ticket.turn.release()
            return _refuse(403, why)
        ticket.calls += 1
        call = asyncio.create_task(self._exchange(request, body, ticket))
        ticket.under_way.add(call)
        self._under_way.add(call)

        def ended(call: asyncio.Task[web.StreamResponse]) -> None:
            ticket.under_way.discard(call)
            self._under_way.discard(call)
            if capped:
                ticket.turn.release()
            if not call.cancelled():
                call.exception()  # whoever waits is told; an agent that hung up does not

        call.add_done_callback(ended)
        return await asyncio.shield(call)

    async def _exchange(
        self, request: web.Request, body: bytes, ticket: Ticket
    ) -> web.StreamResponse:
        """One call of the endpoint, counted however it ends."""
        assert self._session is not None
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        url = self._base_url + request.path.removeprefix("/v1")
        try:
            # A redirect could lead anywhere, with the key.
            async with self._session.post(
                url, data=_counted(body), headers=headers, allow_redirects=False
            ) as answer:
                return await self._pass_on(request, answer, ticket)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            ticket.failures += 1
            late = isinstance(error, TimeoutError)
            if late and not isinstance(error, aiohttp.ConnectionTimeoutError):
                ticket.cost = None  # it was at work, and nobody knows on how much
            said = f"the endpoint could not be reached: {type(error).__name__}: {error}"
            return _refuse(504 if late else _AWAY, said)
        except asyncio.CancelledError:
            ticket.cost = None
            raise

    async def _pass_on(
        self, request: web.Request, answer: aiohttp.ClientResponse, ticket: Ticket
    ) -> web.StreamResponse:
        headers = {
            name: self._hidden(answer.headers[name].encode()).decode()
            for name in _HEADERS
            if name in answer.headers
        }
        if answer.content_type == "text/event-stream" and answer.status < 400:
            return await self._stream(request, answer, ticket, headers)
        content = await answer.read()
        if answer.status >= 400:
            ticket.failures += 1
            content = self._hidden(content)
            if answer.status in (401, 403):
                ticket.refused = content[:500].decode("utf-8", "replace")
        else:
            ticket.answers += 1
            ticket.count(_usage(content), self._prices)
        status = _AWAY if answer.status == 502 else answer.status
        return web.Response(status=status, body=content, headers=headers)

    async def _stream(
        self,
        request: web.Request,
        answer: aiohttp.ClientResponse,
        ticket: Ticket,
        headers: Mapping[str, str],
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, headers=headers)
        usage: Mapping[str, Any] = {}
        try:
            await response.prepare(request)
            listening = True
        except ConnectionError:
            listening = False
        try:
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    usage = _usage(line[6:]) or usage
                if listening:
                    try:
                        await response.write(line)
                    except ConnectionError:
                        listening = False  # the rest is read for the count at its end
        finally:
            ticket.answers += 1
            ticket.count(usage, self._prices)
        if listening:
            await response.write_eof()
        return response

    def _hidden(self, content: bytes) -> bytes:
        """What an endpoint says, without the key: some repeat the one that they refuse."""
        if self._key is None or len(self._key) < _SECRET_LENGTH:
            return content
        for form in (self._key, json.dumps(self._key)[1:-1]):
            content = content.replace(form.encode(), b"[key]")
        return content


async def _break_off(calls: Iterable[asyncio.Task[web.StreamResponse]]) -> None:
    ending = list(calls)
    for call in ending:
        call.cancel()
    await asyncio.gather(*ending, return_exceptions=True)


def _counted(body: bytes) -> bytes:
    """The request, with the count of its tokens asked for where it is streamed."""
    with contextlib.suppress(ValueError):
        document = json.loads(body)
        if isinstance(document, dict) and document.get("stream") and "messages" in document:
            options = document.get("stream_options")
            kept = options if isinstance(options, dict) else {}
            document["stream_options"] = {**kept, "include_usage": True}
            return json.dumps(document).encode()
    return body


def _usage(content: bytes) -> Mapping[str, Any]:
    with contextlib.suppress(ValueError):
        document = json.loads(content)
        usage = document.get("usage") if isinstance(document, dict) else None
        if isinstance(usage, dict):
            return usage
    return {}


def _refuse(status: int, message: str) -> web.Response:
    error = {"message": message, "type": "spider_proxy", "code": str(status), "param": None}
    return web.json_response({"error": error}, status=status)
