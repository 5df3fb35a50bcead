"""A scripted model for agents: an OpenAI-compatible server that plays a part turn by turn.

A *part* is a list of turns. Which part is played stands in the conversation, as ``[[part:NAME]]``,
and which turn follows from the number of answers in it, so that the server keeps no state: however
often a request is repeated, and after a restart, it is answered alike. A turn is a mapping:

- ``{"call": "terminal", "args": {…}}``, or ``{"calls": [(name, args), …]}``: tool calls;
  ``args`` that are a string go out as they are;
- ``{"text": "…"}``: plain text, which ends an episode; ``"reasoning"`` may stand beside either;
- ``{"status": 500}``: an error; ``{"hang": True}``: no answer at all; ``{"after": 5.0}`` beside
  any: it takes so many seconds; ``{"gate": True}`` beside any: it waits until ``gate`` is set.

It is asked in OpenAI's protocol, at ``base_url``, or as Azure's deployments are, at ``azure``.
Past its last turn a part finishes. ``requests`` holds each body as it came, ``keys`` the bearer
tokens, or Azure's keys. As a process of its own, ``python -m tests.support.agent_model PARTS.json
[LATENCY]`` prints its address on one line.
"""

from __future__ import annotations

__all__ = ["AgentModel", "running_model", "spawn_model"]

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

Turn = Mapping[str, Any]
_PART = re.compile(r"\[\[part:([\w-]+)\]\]")
USAGE = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}


NAME = "scripted"
"""What the server calls its model; it answers to any."""


class AgentModel:
    def __init__(self, parts: Mapping[str, Sequence[Turn]], *, latency: float = 0.0) -> None:
        self.parts = dict(parts)
        self.latency = latency
        self.requests: list[dict[str, Any]] = []
        self.answers: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.gate = threading.Event()
        self.base_url = ""
        self.azure = ""

    async def start(self) -> web.AppRunner:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/openai/deployments/{name}/chat/completions", self._answer)
        app.router.add_get("/v1/models", self._models)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        self.azure = f"http://127.0.0.1:{port}"
        self.base_url = f"{self.azure}/v1"
        return runner

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": NAME}]})

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        headers = request.headers
        self.keys.append(headers.get("api-key") or headers.get("Authorization", ""))
        if self.latency:
            await asyncio.sleep(self.latency)
        turn = self._turn(body["messages"])
        if turn.get("hang"):
            await asyncio.sleep(3600)
        await asyncio.sleep(turn.get("after", 0.0))
        while turn.get("gate") and not self.gate.is_set():  # noqa: ASYNC110 - by another thread
            await asyncio.sleep(0.02)
        if "status" in turn:
            said = {"error": {"message": turn.get("message", "scripted"), "type": "scripted"}}
            return web.json_response(said, status=turn["status"])
        message = _message(turn, len(body["messages"]))
        self.answers.append(message)
        calls = message.get("tool_calls")
        document = {
            "id": f"chatcmpl-{len(self.requests)}",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [
                {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
            ],
            "usage": turn.get("usage", USAGE),
        }
        return web.json_response(document)

    def _turn(self, messages: Sequence[Mapping[str, Any]]) -> Turn:
        found = _PART.search(json.dumps(messages))
        part = self.parts[found.group(1)] if found else next(iter(self.parts.values()))
        number = sum(message["role"] == "assistant" for message in messages)
        if number < len(part):
            return part[number]
        return {"call": "finish", "args": {"message": "done"}}


def _message(turn: Turn, at: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": turn.get("text")}
    if "reasoning" in turn:
        message["reasoning_content"] = turn["reasoning"]
    calls = turn.get("calls") or ([(turn["call"], turn["args"])] if "call" in turn else [])
    if calls:
        message["tool_calls"] = [
            {
                "id": f"call-{at}-{number}",
                "type": "function",
                "function": {
                    "name": name,
                    "arguments": args if isinstance(args, str) else json.dumps(args),
                },
            }
            for number, (name, args) in enumerate(calls)
        ]
    return message


@contextlib.contextmanager
def running_model(
    parts: Mapping[str, Sequence[Turn]], *, latency: float = 0.0
) -> Iterator[AgentModel]:
    """The server on a thread of this process."""
    model = AgentModel(parts, latency=latency)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="agent-model", daemon=True)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(model.start(), loop).result(30)
    try:
        yield model
    finally:

        async def stop() -> None:
            runner._shutdown_timeout = 0.1  # a hanging turn is not waited for
            await runner.cleanup()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextlib.contextmanager
def spawn_model(
    folder: Path, parts: Mapping[str, Sequence[Turn]], *, latency: float = 0.0
) -> Iterator[str]:
    """The server in a process of its own; its address."""
    script = folder / "parts.json"
    script.write_text(json.dumps(parts), encoding="utf-8")
    command = [sys.executable, "-m", "tests.support.agent_model", str(script), str(latency)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def _serve(parts: Mapping[str, Sequence[Turn]], latency: float) -> None:
    model = AgentModel(parts, latency=latency)
    await model.start()
    print(model.base_url, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(json.loads(Path(sys.argv[1]).read_text("utf-8")), float(sys.argv[2])))
