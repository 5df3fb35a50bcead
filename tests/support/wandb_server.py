"""Weights & Biases for tests: what the real SDK asks of its server when a run is made, goes on,
is rewound and logs. Runs live in memory.

    with WandbServer() as server:
        env = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        …
        server.run("project", "run-id").steps

A history line of a step at or below the run's last is not refused here: the SDK is what drops
those, and a test that finds them twice has found its fault.
"""

from __future__ import annotations

__all__ = ["ENTITY", "KEY", "WandbRun", "WandbServer"]

import base64
import dataclasses
import gzip
import http.server
import json
import re
import socket
import threading
from typing import Any, Self

KEY = "0123456789abcdef0123456789abcdef01234567"
ENTITY = "alice"

_STREAM = re.compile(r"/files/(?P<entity>[^/]+)/(?P<project>[^/]+)/(?P<run>[^/]+)/file_stream")


@dataclasses.dataclass
class WandbRun:
    """``history`` and ``summary`` are what was streamed; ``archived`` what rewinding cut off."""

    id: str
    project: str
    name: str | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    archived: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    exit_code: int | None = None
    files: list[str] = dataclasses.field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        return [line["_step"] for line in self.history]


class WandbServer:
    """``rewinds``: whether it can (the hosted service may, others cannot). ``down`` makes every
    answer a 503, which the SDK takes for a network that is gone."""

    def __init__(self, *, rewinds: bool = True) -> None:
        self.rewinds = rewinds
        self.down = False
        self.runs: dict[tuple[str, str], WandbRun] = {}
        self.asked: list[str] = []  #: operations and streams, in order
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def run(self, project: str, run_id: str) -> WandbRun:
        return self.runs[project, run_id]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.close_connections()
        self._server.server_close()
        self._thread.join()

    # What is asked for ---------------------------------------------------------------

    def answer(self, method: str, path: str, key: str | None, body: Any) -> tuple[int, Any]:
        if self.down:
            return 503, {"error": "down"}
        if method == "PUT" and path.startswith("/upload/"):
            return 200, {}
        if method == "GET":
            return 200, {}
        if key != KEY:
            return 401, {"errors": [{"message": "user is not logged in"}]}
        if found := _STREAM.fullmatch(path):
            self.asked.append("file_stream")
            return 200, self._stream(self.runs[found["project"], found["run"]], body)
        if path == "/graphql":
            name = body.get("operationName") or ""
            self.asked.append(name)
            act = getattr(self, f"_{name}", None)
            if act is None:
                return 200, {"data": {}}
            answer = act(body.get("variables") or {})
            return 200, answer if "errors" in answer else {"data": answer}
        return 404, {"error": path}

    def _stream(self, run: WandbRun, body: dict[str, Any]) -> dict[str, Any]:
        for name, chunk in (body.get("files") or {}).items():
            lines = [json.loads(line) for line in chunk["content"]]
            if name == "wandb-history.jsonl":
                run.history[chunk["offset"] :] = lines
            elif name == "wandb-summary.json":
                run.summary = lines[-1]
        if body.get("complete"):
            run.exit_code = body["exitcode"]
        return {}

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802 - the operation's name
        names = {"id": "u1", "entity": ENTITY, "username": ENTITY, "email": "a@example.org"}
        return {"viewer": {**names, "flags": "{}", "teams": {"edges": []}}}

    def _RunResumeStatus(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = self.runs.get((asked["project"], asked["name"]))
        if run is None:
            return {"model": None}
        tail = [json.dumps(line) for line in run.history[-1:]]
        bucket = {
            **self._described(run),
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "tags": [],
            "notes": None,
            "wandbConfig": '{"t": 1}',
        }
        project = {"id": "p1", "name": run.project}
        return {"model": {**project, "entity": _entity(), "bucket": bucket}}

    def _UpsertBucket(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        place = asked["project"], asked["name"]
        inserted = place not in self.runs
        run = self.runs.setdefault(place, WandbRun(asked["name"], asked["project"]))
        run.name = asked.get("displayName") or run.name
        if asked.get("config"):
            run.config = json.loads(asked["config"])
        return {"upsertBucket": {"bucket": self._described(run), "inserted": inserted}}

    def _RewindRun(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = self.runs.get((asked["project"], asked["runName"]))
        if not self.rewinds or run is None:
            return {"errors": [{"message": "rewind is not enabled"}], "data": None}
        kept = [line for line in run.history if line["_step"] <= asked["metricValue"]]
        run.archived += run.history[len(kept) :]
        run.history = kept
        return {"rewindRun": {"rewoundRun": self._described(run)}}

    def _CreateRunFiles(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = self.runs[asked["project"], asked["run"]]
        run.files += asked["files"]
        files = [
            {"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in asked["files"]
        ]
        return {"createRunFiles": {"runID": run.id, "uploadHeaders": [], "files": files}}

    @staticmethod
    def _described(run: WandbRun) -> dict[str, Any]:
        return {
            "id": f"storage-{run.id}",
            "name": run.id,
            "displayName": run.name,
            "description": None,
            "config": json.dumps(run.config),
            "sweepName": None,
            "project": {"id": "p1", "name": run.project, "entity": _entity()},
            "historyLineCount": len(run.history),
        }


def _entity() -> dict[str, str]:
    return {"id": "e1", "name": ENTITY}


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], owner: WandbServer) -> None:
        super().__init__(address, _Handler)
        self.owner = owner
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed hangs up in the middle of an answer."""

    def close_connections(self) -> None:
        for request in list(self._open):
            try:
                request.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # its own thread closed it at this moment


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        scheme, _, word = (self.headers.get("Authorization") or "").partition(" ")
        key = base64.b64decode(word).decode().partition(":")[2] if scheme == "Basic" else None
        try:
            document = json.loads(body) if body else None
        except ValueError:
            document = None  # an upload
        with self.server.owner.lock:
            status, answer = self.server.owner.answer(self.command, self.path, key, document)
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = _answer  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Tests look at the server; nothing goes to standard error."""
