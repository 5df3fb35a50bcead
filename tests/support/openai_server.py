"""A scripted OpenAI-compatible server: the real protocol over a real socket, faults on order.

It answers ``POST /v1/chat/completions`` with ``"echo: " + the last message``, after
``latency_ms``. Faults come in two ways:

* by chance, drawn from ``seed`` for each request anew: ``error_rate`` (500), ``throttle_rate``
  (429, with ``retry_after`` if given), ``malformed_rate``, ``hang_rate``, ``cut_rate``;
  ``max_concurrent`` answers 429 above so many requests in flight;
* by a marker in the last message, always or the first N times: ``[[500]]`` or any status,
  ``[[429:3]]`` three times and then well, ``[[cut]]``, ``[[hang]]``, ``[[malformed]]``,
  ``[[slow]]`` (ten times the latency); ``[[null]]`` (null content), ``[[tools]]``,
  ``[[reasoning]]``, ``[[reasoning_content]]`` and ``[[thinking]]`` shape a good answer.

``api_key`` answers 401 to anything else, ``models`` 404 to other names. ``GET /stats`` says what
came in (``?prompts=1`` adds the count of each last message), ``POST /reset`` forgets it, and
``GET /last`` is the last request's body and headers. As a process of its own::

    python -m tests.support.openai_server --port 0 --latency-ms 200 --error-rate 0.02

prints ``{"port": …, "pid": …, "base_url": …}`` on one line. The HTTP is parsed here, not by a
framework, so that one core serves several thousand requests a second and any of the ways in
which a connection can break can be played.
"""

from __future__ import annotations

__all__ = ["Script", "ScriptedServer", "running_server", "spawn_server"]

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import os
import random
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import orjson

_MARKER = re.compile(r"\[\[([a-z_]+|\d{3})(?::(\d+))?\]\]")
_SHAPES = frozenset({"null", "tools", "reasoning", "reasoning_content", "thinking", "length"})


@dataclasses.dataclass
class Script:
    """What the server does; may be changed while it runs."""

    latency_ms: float = 0.0
    error_rate: float = 0.0
    throttle_rate: float = 0.0
    retry_after: str | None = None
    malformed_rate: float = 0.0
    hang_rate: float = 0.0
    cut_rate: float = 0.0
    max_concurrent: int | None = None
    api_key: str | None = None
    models: str | None = None
    seed: int = 0


class _Counts:
    def __init__(self) -> None:
        self.requests = 0
        self.in_flight = 0
        self.max_in_flight = 0
        self.connections = 0
        self.statuses: collections.Counter[str] = collections.Counter()
        self.prompts: collections.Counter[str] = collections.Counter()
        self.first_request: float | None = None  # time.time()
        self.last_request: float | None = None
        self.last_response: float | None = None
        self.last_body: Any = None
        self.last_headers: dict[str, str] = {}

    def snapshot(self, *, prompts: bool) -> dict[str, Any]:
        shown = {k: v for k, v in vars(self).items() if k not in ("last_body", "last_headers")}
        shown["statuses"] = dict(self.statuses)
        shown["distinct_prompts"] = len(self.prompts)
        shown["repeated"] = self.requests - len(self.prompts)
        if prompts:
            shown["prompts"] = dict(self.prompts)
        else:
            del shown["prompts"]
        return shown


class ScriptedServer:
    """The server, on the running loop. ``port`` and ``base_url`` hold after ``start``."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.counts = _Counts()
        self.port = 0
        self._random = random.Random(self.script.seed)
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._quiet = asyncio.Event()  # set while there is no connection
        self._quiet.set()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def stats(self) -> dict[str, Any]:
        """What ``GET /stats?prompts=1`` answers."""
        return self.counts.snapshot(prompts=True)

    async def start(self, port: int = 0) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self, loop), "127.0.0.1", port, backlog=2048
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.transport.abort()
        await self._quiet.wait()

    def decide(self, text: str) -> str:
        """``ok``, a status, ``cut``, ``hang``, ``malformed`` or ``slow`` for this request."""
        script, draw = self.script, self._random.random()
        if "[[" in text and (found := _MARKER.search(text)) is not None:
            kind, times = found.group(1), found.group(2)
            if kind not in _SHAPES and (times is None or self.counts.prompts[text] <= int(times)):
                return kind
        if script.max_concurrent is not None and self.counts.in_flight > script.max_concurrent:
            return "429"
        for rate, kind in (
            (script.error_rate, "500"),
            (script.throttle_rate, "429"),
            (script.malformed_rate, "malformed"),
            (script.hang_rate, "hang"),
            (script.cut_rate, "cut"),
        ):
            if draw < rate:
                return kind
            draw -= rate
        return "ok"


class _Connection(asyncio.Protocol):
    """One keep-alive connection; requests on it come one after another."""

    transport: asyncio.Transport

    def __init__(self, server: ScriptedServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.loop = loop
        self.buffer = b""
        self.waiting: asyncio.TimerHandle | None = None
        self.counted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self.server._connections.add(self)
        self.server._quiet.clear()
        self.server.counts.connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.server._connections.discard(self)
        if not self.server._connections:
            self.server._quiet.set()
        if self.waiting is not None:
            self.waiting.cancel()
        self._leave()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.buffer[:end]
        length = 0
        at = head.lower().find(b"content-length:")
        if at >= 0:
            length = int(head[at + 15 :].split(b"\r\n", 1)[0])
        if len(self.buffer) < end + 4 + length:
            return
        body = self.buffer[end + 4 : end + 4 + length]
        self.buffer = self.buffer[end + 4 + length :]
        method, target, _ = head.split(b" ", 2)
        if method == b"POST" and target.endswith(b"/chat/completions"):
            self._chat(head, body)
        else:
            self._other(method.decode(), target.decode())

    def _chat(self, head: bytes, body: bytes) -> None:
        counts, script = self.server.counts, self.server.script
        now = time.time()
        counts.requests += 1
        counts.in_flight += 1
        self.counted = True
        counts.max_in_flight = max(counts.max_in_flight, counts.in_flight)
        counts.first_request = counts.first_request or now
        counts.last_request = now
        counts.last_headers = {"raw": head.decode("latin-1")}
        request = counts.last_body = orjson.loads(body)
        text = request["messages"][-1].get("content") or ""
        counts.prompts[text] += 1
        outcome = self.server.decide(text)
        # To the end of the line: a longer key that begins alike is another key.
        wanted = f"bearer {script.api_key}\r\n".encode()
        if (
            script.api_key is not None
            and wanted not in head.replace(b"Bearer", b"bearer") + b"\r\n"
        ):
            outcome = "401"
        elif script.models is not None and request["model"] not in script.models.split(","):
            outcome = "404"
        latency = script.latency_ms / 1000
        if outcome == "429" and "[[" not in text:
            latency = min(latency, 0.005)  # gateways refuse at once
        if outcome == "slow":
            latency *= 10
        if outcome == "hang":
            counts.statuses["hang"] += 1
        elif latency:
            self.waiting = self.loop.call_later(latency, self._answer, outcome, request, text)
        else:
            self._answer(outcome, request, text)

    def _answer(self, outcome: str, request: dict[str, Any], text: str) -> None:
        counts = self.server.counts
        counts.statuses[outcome] += 1
        counts.last_response = time.time()
        self.waiting = None
        if outcome == "cut":
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")
            self.transport.abort()
        elif outcome == "malformed":
            self._send(200, b'{"choices": [{"message": {"content": "half an ans')
        elif outcome in ("ok", "slow"):
            self._send(200, _completion(request, text))
        else:
            error = {"error": {"message": f"scripted {outcome}", "type": "scripted", "code": None}}
            extra = b""
            if outcome == "429" and self.server.script.retry_after is not None:
                extra = f"Retry-After: {self.server.script.retry_after}\r\n".encode()
            if outcome.startswith("3"):
                extra = f"Location: {self.server.base_url}/chat/completions\r\n".encode()
            self._send(int(outcome), orjson.dumps(error), extra)

    def _other(self, method: str, target: str) -> None:
        counts = self.server.counts
        url = urllib.parse.urlsplit(target)
        if url.path == "/stats":
            prompts = "prompts=1" in url.query
            self._send(200, orjson.dumps(counts.snapshot(prompts=prompts)))
        elif url.path == "/last":
            self._send(200, orjson.dumps({"body": counts.last_body, **counts.last_headers}))
        elif url.path == "/reset" and method == "POST":
            self.server.counts = _Counts()
            self._send(200, b"{}")
        elif url.path.endswith("/models"):
            names = (self.server.script.models or "tiny").split(",")
            data = [{"id": name, "object": "model"} for name in names]
            self._send(200, orjson.dumps({"object": "list", "data": data}))
        else:
            self._send(404, b'{"error": {"message": "no such route"}}')

    def _send(self, status: int, body: bytes, extra: bytes = b"") -> None:
        self._leave()
        if not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n%b"
                % (status, extra, len(body), body)
            )

    def _leave(self) -> None:
        if self.counted:
            self.counted = False
            self.server.counts.in_flight -= 1


def _completion(request: dict[str, Any], text: str) -> bytes:
    content: str | None = f"echo: {text}"
    message: dict[str, Any] = {"role": "assistant"}
    finish = "stop"
    found = _MARKER.search(text) if "[[" in text else None
    shape = found.group(1) if found is not None else ""
    if shape == "null":
        content = None
    elif shape == "tools":
        content, finish = None, "tool_calls"
        function = {"name": "look_up", "arguments": '{"word": "spider"}'}
        message["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
    elif shape == "length":
        finish = "length"
    elif shape in _SHAPES:
        message[shape] = "thought about it"
    message["content"] = content
    prompt_tokens = sum(len((m.get("content") or "").split()) for m in request["messages"])
    completion_tokens = len((content or "").split())
    return orjson.dumps(
        {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": 0,
            "model": request.get("model"),
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }
    )


@contextlib.contextmanager
def running_server(script: Script | None = None) -> Iterator[ScriptedServer]:
    """A server on a thread of this process. Its ``script`` and ``counts`` may be looked at
    and changed from the test."""
    server = ScriptedServer(script)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="scripted-openai", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextlib.contextmanager
def spawn_server(*arguments: str) -> Iterator[str]:
    """A server in a process of its own, with these command line arguments; yields its base
    URL (``http://127.0.0.1:PORT/v1``). It ends with the block, or with this process."""
    command = [sys.executable, "-m", "tests.support.openai_server", "--until-eof", *arguments]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield orjson.loads(process.stdout.readline())["base_url"]
        finally:
            process.stdin.close()
            process.wait(10)


async def _serve(options: argparse.Namespace) -> None:
    fields = {field.name for field in dataclasses.fields(Script)}
    values = {name: value for name, value in vars(options).items() if name in fields}
    server = ScriptedServer(Script(**values))
    await server.start(options.port)
    line = {"port": server.port, "pid": os.getpid(), "base_url": server.base_url}
    print(orjson.dumps(line).decode(), flush=True)
    if options.until_eof:
        await asyncio.to_thread(sys.stdin.buffer.read)
        await server.stop()
    else:
        await asyncio.Event().wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="openai_server", description="A scripted server.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--until-eof", action="store_true", help="end when stdin closes")
    kinds = {"max_concurrent": int, "api_key": str, "models": str, "retry_after": str, "seed": int}
    for field in dataclasses.fields(Script):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=kinds.get(field.name, float), default=field.default)
    return parser


if __name__ == "__main__":
    import uvloop

    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_serve(_parser().parse_args()))
