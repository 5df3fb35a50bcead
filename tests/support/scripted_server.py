"""A real HTTP server that answers by a script, to cut, stall and refuse on purpose.

``ScriptedServer`` listens on a port of the system's choice. A route is ``(method, path)``
without the query; its answers are used in turn and the last one stays. An answer is a function
of the request's handler; the ones below cover what the tests need.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclasses.dataclass(frozen=True)
class Seen:
    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    body: bytes

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self._chunks()
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = self.server.owner.take(Seen(self.command, path, query, headers, self.body))
        answer(self)

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _serve  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing on stderr."""

    def head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def cut(self) -> None:
        """Close the connection as a dying process would."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


Answer = Callable[[Handler], None]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    owner: ScriptedServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave in the middle are part of the tests."""


def _no_route(seen: Seen) -> Answer:
    return problem(404, f"no route {seen.method} {seen.path}")


class ScriptedServer:
    def __init__(self) -> None:
        self.routes: dict[tuple[str, str], list[Answer]] = {}
        self.seen: list[Seen] = []
        #: What is answered where there is no route.
        self.otherwise: Callable[[Seen], Answer] = _no_route
        self.released = threading.Event()
        self._lock = threading.Lock()
        self._http = _Server(("127.0.0.1", 0), Handler)
        self._http.owner = self
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def on(self, method: str, path: str, *answers: Answer) -> None:
        self.routes[method, path] = list(answers)

    def take(self, seen: Seen) -> Answer:
        with self._lock:
            self.seen.append(seen)
            answers = self.routes.get((seen.method, seen.path))
            if not answers:
                return self.otherwise(seen)
            return answers.pop(0) if len(answers) > 1 else answers[0]

    def requests(self, method: str, path: str) -> list[Seen]:
        return [seen for seen in self.seen if (seen.method, seen.path) == (method, path)]

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.released.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def answer_json(document: Any, status: int = 200, **headers: str) -> Answer:
    return answer_bytes(json.dumps(document).encode(), status, "application/json", **headers)


def problem(status: int, detail: str, *, errors: Any = None, **headers: str) -> Answer:
    document: dict[str, Any] = {"title": "refused", "status": status, "detail": detail}
    if errors is not None:
        document["errors"] = errors
    body = json.dumps(document).encode()
    return answer_bytes(body, status, "application/problem+json", **headers)


def answer_bytes(
    body: bytes, status: int = 200, kind: str = "application/octet-stream", **headers: str
) -> Answer:
    def answer(handler: Handler) -> None:
        handler.head(status, Content_Type=kind, Content_Length=str(len(body)), **headers)
        if handler.command != "HEAD":
            handler.wfile.write(body)

    return answer


def cut_before_answer(handler: Handler) -> None:
    handler.cut()


def cut_body(body: bytes, promised: int, kind: str = "application/octet-stream") -> Answer:
    """Promise ``promised`` bytes, send ``body``, cut."""

    def answer(handler: Handler) -> None:
        handler.head(200, Content_Type=kind, Content_Length=str(promised))
        handler.wfile.write(body)
        handler.cut()

    return answer


def frame(event: dict[str, Any]) -> bytes:
    """One job event as the API sends it."""
    return f"id: {event['offset']}-1\ndata: {json.dumps(event)}\n\n".encode()


def named_frame(name: str, document: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(document)}\n\n".encode()


def event_stream(frames: Iterable[bytes], then: str = "close") -> Answer:
    """SSE, chunked. ``then``: ``close`` ends it properly, ``cut`` breaks the connection,
    ``hold`` sends heartbeats until the server stops, ``silence`` sends nothing more."""

    def answer(handler: Handler) -> None:
        handler.head(200, Content_Type="text/event-stream", Transfer_Encoding="chunked")

        def send(data: bytes) -> None:
            handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            handler.wfile.flush()

        for data in frames:
            send(data)
        if then == "cut":
            handler.cut()
            return
        released = handler.server.owner.released
        while then == "hold" and not released.wait(0.02):
            send(b": beat\n\n")
        if then == "silence":
            released.wait()
        send(b"")

    return answer


def event(offset: int, code: str, message: str = "", **data: Any) -> dict[str, Any]:
    return {
        "offset": offset,
        "timestamp": f"2026-01-01T00:00:{offset % 60:02d}Z",
        "level": "info",
        "code": code,
        "message": message or code,
        "data": data,
    }


def status_document(status: str, events: Iterable[dict[str, Any]] = (), **changes: Any) -> Any:
    """A status document for job ``j1``; ``events`` is its whole log."""
    log = list(events)
    return {
        "job_id": "j1",
        "status": status,
        "submitted_at": "2026-01-01T00:00:00Z",
        "updated_at": "2026-01-01T00:00:00Z",
        "messages": [],
        "error": None,
        "artifacts_path": None,
        "remote_artifact": None,
        "metrics": {},
        "job": {},
        "events": log,
        "events_next_offset": log[-1]["offset"] + 1 if log else 0,
        "events_start_offset": log[0]["offset"] if log else 0,
        "events_truncated": False,
        **changes,
    }


def job_status(status: str, log: list[dict[str, Any]], **changes: Any) -> Answer:
    """``GET /v1/jobs/j1``, honouring ``since``."""

    def answer(handler: Handler) -> None:
        query = handler.path.partition("?")[2]
        since = int(query.removeprefix("since=") or 0) if query.startswith("since=") else 0
        document = status_document(status, log, **changes)
        document["events"] = [entry for entry in log if entry["offset"] >= since]
        answer_json(document)(handler)

    return answer
