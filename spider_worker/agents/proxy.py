"""The proxy between agents and an OpenAI-compatible endpoint: it adds the key and counts the money.

An agent's process holds a *ticket*, which is worth nothing outside: with it as its key the agent
speaks to a Unix socket here, and so may whatever it runs. A ticket has caps, on calls and on
dollars, and ends with its episode. Retries are the agent's SDK's; the proxy makes none.
"""

from __future__ import annotations

__all__ = ["LlmProxy", "Prices", "Ticket"]

import contextlib
import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping
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


@dataclasses.dataclass
class Ticket:
    """One episode's right to call the model. ``cost`` is in dollars and None once a call's is not
    known; ``max_cost`` and ``max_calls`` None are no cap. A call that is under way may go over
    ``max_cost``; none begins after."""

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

    def refusal(self) -> str | None:
        """Why no further call is allowed, None if one is."""
        if self.closed:
            return "this episode has ended"
        if self.max_calls is not None and self.calls >= self.max_calls:
            return f"the cap of {self.max_calls} calls of the model is reached"
        if self.max_cost is not None and self.cost is None:
            return (
                "there is a cap on money, and the endpoint does not say how many tokens a call had"
            )
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
        ticket.closed = True
        self._tickets.pop(ticket.key, None)

    async def _call(self, request: web.Request) -> web.StreamResponse:
        held = request.headers.get("Authorization", "").removeprefix("Bearer ")
        ticket = self._tickets.get(held)
        if ticket is None:
            return _refuse(401, "no episode that is under way has this key")
        if (why := ticket.refusal()) is not None:
            return _refuse(403, why)
        ticket.calls += 1
        assert self._session is not None
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        body = await request.read()
        url = self._base_url + request.path.removeprefix("/v1")
        try:
            # A redirect could lead anywhere, with the key.
            async with self._session.post(
                url, data=_counted(body), headers=headers, allow_redirects=False
            ) as answer:
                return await self._pass_on(request, answer, ticket)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            ticket.failures += 1
            said = f"the endpoint could not be reached: {type(error).__name__}: {error}"
            return _refuse(504 if isinstance(error, TimeoutError) else _AWAY, said)

    async def _pass_on(
        self, request: web.Request, answer: aiohttp.ClientResponse, ticket: Ticket
    ) -> web.StreamResponse:
        headers = {name: answer.headers[name] for name in _HEADERS if name in answer.headers}
        if answer.content_type == "text/event-stream":
            return await self._stream(request, answer, ticket, headers)
        content = await answer.read()
        if answer.status >= 400:
            ticket.failures += 1
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
        await response.prepare(request)
        usage: Mapping[str, Any] = {}
        try:
            async for line in answer.content:
                await response.write(line)
                if line.startswith(b"data: {"):
                    usage = _usage(line[6:]) or usage
        finally:
            # Whoever hangs up has had what it has had; what that cost is not known then.
            ticket.answers += 1
            ticket.count(usage, self._prices)
        await response.write_eof()
        return response


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
