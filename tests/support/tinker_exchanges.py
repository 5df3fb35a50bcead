"""A Tinker service that replays exchanges over a real socket.

An exchange, as ``tests/support/tinker_exchanges.json`` has them::

    {"request": "POST /api/v1/optim_step", "body": {"adam_params": {"eps": 1e-8}},
     "answer": {"metrics": {}}, "later": true}

``body`` is the part of the request's that matters (``"*"`` is any value), ``status`` 200 where
none is given; ``location`` redirects. With ``later`` the request is answered by a promise, and
``answer`` is what it comes to. ``$URL`` in an answer is this server. Each exchange happens once, or
not at all where it is ``optional`` (some versions of the SDK ask more than others), in any order;
what has none is answered by 404 and noted in ``problems``. Health, heartbeats, telemetry and
feature flags need no exchange.

Versions of the SDK from 0.25 on send some requests as protobuf and want some answers so; they are
put into words, and back, with the SDK's own messages.
"""

from __future__ import annotations

__all__ = ["Exchange", "TinkerExchanges", "load_exchanges"]

import http.server
import json
import math
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.tinker_protobuf import encoded, pass_in_words

Exchange = dict[str, Any]

_PROTOBUF = "application/x-protobuf"
_ALWAYS = {
    "GET /": {"name": "Tinker"},
    "GET /api/v1/healthz": {"status": "ok"},
    "POST /api/v1/session_heartbeat": {"type": "session_heartbeat"},
    "POST /api/v1/telemetry": {"status": "accepted"},
    "POST /api/v1/client/config": {},
    "POST /api/v1/client/dynamic_config": {},
}
_ENDING = re.compile(r"/api/v1/sessions/[^/]+/finish")


def load_exchanges(name: str) -> list[Exchange]:
    """Those of one scenario."""
    path = Path(__file__).with_name("tinker_exchanges.json")
    found: list[Exchange] = json.loads(path.read_text(encoding="utf-8"))[name]
    return found


class TinkerExchanges:
    """A context manager. ``files`` are answered by their path, as they are. ``key`` None lets any
    key pass; another is answered by 401."""

    def __init__(
        self,
        exchanges: Iterable[Exchange],
        *,
        files: Mapping[str, bytes] | None = None,
        key: str | None = None,
    ) -> None:
        self._files = dict(files or {})
        self._key = key
        self._promises: list[Exchange] = []
        self._lock = threading.Lock()
        self.problems: list[str] = []
        self.keys: set[str] = set()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                server._serve(self, self.rfile.read(length))

            do_GET = do_POST = do_DELETE = handle_any  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        text = json.dumps(list(exchanges)).replace("$URL", self.url)
        self._left: list[Exchange] = json.loads(text)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> TinkerExchanges:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    @property
    def left(self) -> list[str]:
        """The requests that nobody has made, and that were to be made."""
        return [one["request"] for one in self._left if not one.get("optional")]

    def _serve(self, handler: http.server.BaseHTTPRequestHandler, raw: bytes) -> None:
        path = handler.path.partition("?")[0]
        request = f"{handler.command} {path}"
        key = handler.headers.get("X-API-Key", "")
        if self._key is not None and key != self._key:
            _send(handler, 401, {"detail": "Invalid API key"})
            return
        self.keys.add(key)
        if path in self._files:
            _send_raw(handler, 200, self._files[path], "application/octet-stream")
        elif request in _ALWAYS or _ENDING.fullmatch(path):
            _send(handler, 200, _ALWAYS.get(request, {}))
        elif request == "POST /api/v1/retrieve_future":
            exchange = self._promises[int(json.loads(raw)["request_id"])]
            self._answer(handler, exchange, promised=True)
        else:
            self._find(handler, *_words(handler, request, raw))

    def _find(self, handler: http.server.BaseHTTPRequestHandler, request: str, body: Any) -> None:
        with self._lock:
            for exchange in self._left:
                if _matches(exchange["request"], request) and _matches(
                    exchange.get("body", {}), body
                ):
                    self._left.remove(exchange)
                    break
            else:
                self.problems.append(f"{request} {json.dumps(body)}")
                _send(handler, 404, {"detail": "no such exchange"})
                return
            if exchange.get("later"):
                self._promises.append(exchange)
        if exchange.get("later"):
            number = str(len(self._promises) - 1)
            promise: dict[str, Any] = {"request_id": number, "future_id": number}
            if "model_id" in body:
                promise["model_id"] = body["model_id"]
            if "num_samples" in body:
                count = range(body["num_samples"])
                promise["sample_sequence_ids"] = [f"{number}-{sample}" for sample in count]
            _send(handler, 200, promise)
        else:
            self._answer(handler, exchange)

    def _answer(
        self,
        handler: http.server.BaseHTTPRequestHandler,
        exchange: Exchange,
        promised: bool = False,
    ) -> None:
        answer = exchange.get("answer", {})
        if "location" in exchange:
            _send_raw(handler, 302, b"", "text/plain", Location=self.url + exchange["location"])
        elif promised and _PROTOBUF in handler.headers.get("Accept", "") and "error" not in answer:
            _send_raw(handler, 200, encoded(answer), _PROTOBUF)
        else:
            _send(handler, exchange.get("status", 200), answer)


def _send(handler: http.server.BaseHTTPRequestHandler, status: int, body: Any) -> None:
    _send_raw(handler, status, json.dumps(body).encode(), "application/json")


def _send_raw(
    handler: http.server.BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    kind: str,
    **headers: str,
) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def _matches(wanted: Any, found: Any) -> bool:
    if wanted == "*":
        return True
    if isinstance(wanted, str) and wanted.endswith("*") and isinstance(found, str):
        return found.startswith(wanted[:-1])
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(
            name in found and _matches(value, found[name]) for name, value in wanted.items()
        )
    if isinstance(wanted, list):
        return (
            isinstance(found, list)
            and len(wanted) == len(found)
            and all(map(_matches, wanted, found))
        )
    if isinstance(wanted, float) and isinstance(found, (int, float)):
        return math.isclose(wanted, found, rel_tol=1e-5, abs_tol=1e-12)
    return bool(wanted == found)


def _words(
    handler: http.server.BaseHTTPRequestHandler, request: str, raw: bytes
) -> tuple[str, Any]:
    """A request and its body in the words that the versions up to 0.16 send it in."""
    if not raw:
        return request, {}
    if _PROTOBUF not in handler.headers.get("Content-Type", ""):
        return request, json.loads(raw)
    return pass_in_words(raw)
