"""A Hugging Face Hub for tests: the routes that the real ``huggingface_hub`` and ``datasets`` call.

Point a client at it with ``HF_ENDPOINT`` (or ``endpoint=``). In the process of a test::

    with HubEmulator() as hub:
        api = HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)
        hub.fault("commit", "cut_after", nth=2)     # the second commit is applied, its answer lost

For other processes, ``python -m tests.support.hub_emulator [--port 0]`` prints one JSON line
with ``endpoint``, ``port``, ``write_token`` and ``read_token`` and serves until SIGTERM; they
script it over ``POST /_emulator/faults`` (the arguments of ``fault`` as JSON) and look at it
over ``GET /_emulator/state``.

Clients must run with ``HF_HUB_DISABLE_XET=1``: the client asks nobody before it uploads through
hf_xet when that is installed, and the Xet storage protocol is not emulated. LFS uploads go
through the ``basic`` transfer.
"""

from __future__ import annotations

__all__ = ["ORG", "READ_TOKEN", "USER", "WRITE_TOKEN", "Fault", "HubEmulator", "Seen"]

import argparse
import collections
import dataclasses
import http.server
import json
import re
import signal
import socket
import sys
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any, Self

from tests.support.hub_store import LFS_SIZE, LFS_SUFFIXES, Blob, HubError, HubStore, Repo

USER = "alice"
ORG = "acme"  #: alice may write to it
WRITE_TOKEN = "hf_emulatorWriteToken"
READ_TOKEN = "hf_emulatorReadToken"

REPO_PATH = r"(?P<type>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+?)"
API = re.compile(rf"/api/{REPO_PATH}(?:/(?P<what>[a-z-]+)(?:/(?P<rev>[^/]+)(?:/(?P<path>.*))?)?)?")
PREFIX = r"(?:(?P<type>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+?)"
LFS_BATCH = re.compile(rf"/{PREFIX}\.git/info/lfs/objects/batch")
RESOLVE = re.compile(rf"/{PREFIX}/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
LFS_OBJECT = re.compile(rf"/_lfs/{REPO_PATH}/(?P<oid>[0-9a-f]{{64}})(?P<verify>/verify)?")


@dataclasses.dataclass
class Fault:
    """One scripted fault.

    ``route`` is a name from ``Seen.route``. ``kind``: ``status`` answers ``status`` without
    doing anything; ``cut`` closes the connection without doing anything; ``cut_after`` does
    what was asked and then closes the connection; ``hang_after`` does it and then says nothing
    until the client hangs up; ``status_after`` does it and answers ``status``. It strikes from
    the ``nth`` request of that route on (counted from when the fault was set), ``times`` times.
    """

    route: str
    kind: str
    nth: int = 1
    times: int = 1
    status: int = 500
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    seen: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("status", "cut", "cut_after", "hang_after", "status_after"):
            raise ValueError(f"unknown kind of fault: {self.kind}")

    def strikes(self) -> bool:
        self.seen += 1
        return self.nth <= self.seen < self.nth + self.times


@dataclasses.dataclass(frozen=True)
class Seen:
    """A request as it was answered; ``status`` 0: the connection was cut."""

    method: str
    path: str
    route: str
    status: int


@dataclasses.dataclass(frozen=True)
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def json(cls, value: Any, status: int = 200, **headers: str) -> Reply:
        names = {name.replace("_", "-"): text for name, text in headers.items()}
        return cls(
            status, json.dumps(value).encode(), {"Content-Type": "application/json", **names}
        )


class HubEmulator:
    """The server. ``page_size`` is the number of entries in a page of a listing."""

    def __init__(self, *, port: int = 0, page_size: int = 1000) -> None:
        self.store = HubStore()
        self.page_size = page_size
        self.requests: list[Seen] = []
        self.faults: list[Fault] = []
        self.tokens = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
        self._server = _Server(("127.0.0.1", port), self)
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.close_connections()
        self._server.server_close()
        if self._thread is not None:
            self._thread.join()

    def fault(self, route: str, kind: str, **more: Any) -> Fault:
        fault = Fault(route, kind, **more)
        with self.store.lock:
            self.faults.append(fault)
        return fault

    def repo(self, repo_id: str, repo_type: str = "dataset") -> Repo:
        """The repository. Raises LookupError when there is none."""
        repo = self.store.find(repo_id, repo_type)
        if repo is None:
            raise LookupError(repo_id)
        return repo

    def count(self, route: str) -> int:
        """How many requests of that route were seen."""
        return sum(seen.route == route for seen in self.requests)

    # What is asked for ---------------------------------------------------------------

    def route(self, request: _Handler) -> tuple[str, Callable[[], Reply]]:
        """The route's name and what answers it."""
        method = request.command
        path, _, query = request.path.partition("?")
        params = urllib.parse.parse_qs(query)
        if path.startswith("/_emulator/"):
            return "emulator", lambda: self._control(request, path)
        if (method, path) == ("GET", "/api/whoami-v2"):
            return "whoami", lambda: self._whoami(request)
        if (method, path) == ("POST", "/api/repos/create"):
            return "create_repo", lambda: self._create(request)
        if (method, path) == ("DELETE", "/api/repos/delete"):
            return "delete_repo", lambda: self._delete(request)
        if (method, path) == ("POST", "/api/validate-yaml"):
            return "validate_yaml", lambda: self._validate_yaml(request)
        if found := LFS_BATCH.fullmatch(path):
            return "lfs_batch", lambda: self._lfs_batch(request, found)
        if found := LFS_OBJECT.fullmatch(path):
            name = "lfs_verify" if found["verify"] else "lfs_upload"
            return name, lambda: self._lfs_object(request, found)
        if found := API.fullmatch(path):
            name = f"{found['what'] or 'info'}".replace("-", "_")
            return name, lambda: self._api(request, found, params)
        if found := RESOLVE.fullmatch(path):
            return "resolve", lambda: self._resolve(request, found)
        return "unknown", lambda: Reply.json({"error": f"no route {method} {path}"}, 404)

    def _role(self, request: _Handler) -> str | None:
        """``read``, ``write`` or None without a token. A bad token is refused."""
        header = request.headers.get("Authorization")
        if header is None:
            return None
        role = self.tokens.get(header.removeprefix("Bearer ").strip())
        if role is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return role

    def _must_write(self, request: _Handler, namespace: str) -> None:
        role = self._role(request)
        if role is None:
            raise HubError(401, "Invalid username or password.")
        if role != "write" or namespace not in (USER, ORG):
            raise HubError(403, f"You don't have the rights to write to the namespace {namespace}")

    def _find(self, request: _Handler, found: re.Match[str], *, write: bool = False) -> Repo:
        repo_id = urllib.parse.unquote(found["repo"])
        repo = self.store.find(repo_id, (found["type"] or "models").removesuffix("s"))
        role = self._role(request)
        if repo is None or (repo.private and role is None):
            if role is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write:
            self._must_write(request, repo_id.split("/")[0])
        return repo

    def _control(self, request: _Handler, path: str) -> Reply:
        if path == "/_emulator/faults":
            self.fault(**json.loads(request.body))
            return Reply.json({"faults": len(self.faults)})
        if path == "/_emulator/state":
            repos = [
                {
                    "id": repo.id,
                    "type": repo.type,
                    "private": repo.private,
                    "commits": [commit.title for commit in repo.commits],
                    "files": {name: blob.size for name, blob in repo.files.items()},
                }
                for repo in self.store._repos.values()
            ]
            routes = collections.Counter(seen.route for seen in self.requests)
            return Reply.json({"repos": repos, "requests": routes})
        return Reply.json({"error": path}, 404)

    def _whoami(self, request: _Handler) -> Reply:
        role = self._role(request)
        if role is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": role}
        orgs = [{"type": "org", "name": ORG, "roleInOrg": "write"}]
        auth = {"type": "access_token", "accessToken": token}
        return Reply.json({"type": "user", "name": USER, "orgs": orgs, "auth": auth})

    def _create(self, request: _Handler) -> Reply:
        asked = json.loads(request.body)
        namespace = asked.get("organization") or USER
        self._must_write(request, namespace)
        repo_id, repo_type = f"{namespace}/{asked['name']}", asked.get("type") or "model"
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        prefix = "" if repo_type == "model" else f"{repo_type}s/"
        answer = {"url": f"{self.endpoint}/{prefix}{repo_id}", "name": repo_id}
        try:
            self.store.create(repo_id, repo_type, private=private, author=USER)
        except HubError as error:
            return Reply.json({"error": error.message, **answer}, error.status)
        return Reply.json(answer)

    def _delete(self, request: _Handler) -> Reply:
        asked = json.loads(request.body)
        namespace = asked.get("organization") or USER
        self._must_write(request, namespace)
        self.store.delete(f"{namespace}/{asked['name']}", asked.get("type") or "model")
        return Reply.json({})

    def _validate_yaml(self, request: _Handler) -> Reply:
        import yaml

        content = json.loads(request.body)["content"]
        front = re.match(r"---\r?\n(.*?)\r?\n---(?:\r?\n|$)", content, re.DOTALL)
        try:
            data = yaml.safe_load(front[1]) if front else None
        except yaml.YAMLError as error:
            return Reply.json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        if data is not None and not isinstance(data, dict):
            message = "the front matter is not a mapping"
            return Reply.json({"errors": [{"message": message}], "warnings": []}, 400)
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        return Reply.json({"errors": [], "warnings": warnings})

    # Repositories --------------------------------------------------------------------

    def _api(self, request: _Handler, found: re.Match[str], params: dict[str, list[str]]) -> Reply:
        method, what = request.command, found["what"]
        rev = urllib.parse.unquote(found["rev"] or "main")
        path = urllib.parse.unquote(found["path"] or "")
        if method == "POST" and what == "preupload":
            return self._preupload(self._find(request, found, write=True), rev, request)
        if method == "POST" and what == "commit":
            repo = self._find(request, found, write=True)
            lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
            oid = repo.commit(lines, USER).oid
            url = f"{self.endpoint}/{found['type']}/{repo.id}/commit/{oid}"
            return Reply.json(
                {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}
            )
        repo = self._find(request, found)
        if method == "POST" and what == "paths-info":
            form = urllib.parse.parse_qs(request.body.decode())
            return Reply.json(repo.paths_info(rev, form.get("paths", [])))
        if method == "GET" and what in (None, "revision"):
            return self._info(repo, rev, params)
        if method == "GET" and what == "tree":
            recursive = params.get("recursive", ["false"])[0].lower() in ("true", "1")
            return self._page(request, repo.tree(rev, path, recursive=recursive), params)
        if method == "GET" and what == "commits":
            upto = repo.commits[: repo.commits.index(repo.at(rev)) + 1]
            items = [
                {
                    "id": commit.oid,
                    "title": commit.title,
                    "message": commit.message,
                    "date": commit.date,
                    "authors": [{"user": commit.author}],
                }
                for commit in reversed(upto)
            ]
            return self._page(request, items, params)
        if method == "GET" and what == "refs":
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head.oid}
            return Reply.json({"branches": [main], "converts": [], "tags": [], "pullRequests": []})
        return Reply.json({"error": f"no route {method} {request.path}"}, 404)

    def _info(self, repo: Repo, rev: str, params: dict[str, list[str]]) -> Reply:
        commit = repo.at(rev)
        siblings: list[dict[str, Any]] = []
        for path, blob in sorted(commit.files.items()):
            sibling: dict[str, Any] = {"rfilename": path}
            if "blobs" in params:
                sibling |= {"size": blob.size, "blobId": blob.oid}
                if blob.lfs:
                    pointer = len(blob.pointer)
                    sibling["lfs"] = {
                        "sha256": blob.sha256,
                        "size": blob.size,
                        "pointerSize": pointer,
                    }
            siblings.append(sibling)
        return Reply.json(
            {
                "_id": repo.head.oid[:24],
                "id": repo.id,
                "author": repo.id.split("/")[0],
                "sha": commit.oid,
                "lastModified": commit.date,
                "createdAt": repo.commits[0].date,
                "private": repo.private,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
            }
        )

    def _page(
        self, request: _Handler, items: list[dict[str, Any]], params: dict[str, list[str]]
    ) -> Reply:
        start = int(params.get("cursor", ["0"])[0])
        stop = start + min(self.page_size, int(params.get("limit", [self.page_size])[0]))
        if stop >= len(items):
            return Reply.json(items[start:])
        query = urllib.parse.urlencode({**{k: v[0] for k, v in params.items()}, "cursor": stop})
        url = f"{self.endpoint}{request.path.partition('?')[0]}?{query}"
        return Reply.json(items[start:stop], Link=f'<{url}>; rel="next"')

    def _preupload(self, repo: Repo, rev: str, request: _Handler) -> Reply:
        files = []
        present = repo.at(rev).files
        for asked in json.loads(request.body)["files"]:
            path, size = asked["path"], asked["size"]
            lfs = path.endswith(LFS_SUFFIXES) or size > LFS_SIZE
            entry = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in present:
                entry["oid"] = present[path].etag
            files.append(entry)
        return Reply.json({"files": files, "commitOid": repo.at(rev).oid})

    def _lfs_batch(self, request: _Handler, found: re.Match[str]) -> Reply:
        repo = self._find(request, found, write=True)
        asked = json.loads(request.body)
        if "basic" not in asked.get("transfers", ["basic"]):
            raise HubError(422, "this Hub takes LFS uploads by the basic transfer alone")
        objects = []
        for item in asked["objects"]:
            entry: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in repo.uploads:
                href = f"{self.endpoint}/_lfs/{repo.type}s/{repo.id}/{item['oid']}"
                entry["actions"] = {
                    "upload": {"href": href, "header": {}},
                    "verify": {"href": f"{href}/verify", "header": {}},
                }
            objects.append(entry)
        return Reply.json({"transfer": "basic", "objects": objects})

    def _lfs_object(self, request: _Handler, found: re.Match[str]) -> Reply:
        # The URL is what a storage service would have signed: no token is asked for.
        repo = self.repo(found["repo"], found["type"].removesuffix("s"))
        if found["verify"]:
            body = json.loads(request.body)
            if len(repo.uploads.get(body["oid"], b"")) != body["size"]:
                raise HubError(404, "this object was not uploaded")
            return Reply.json({})
        if Blob(request.body, lfs=True).sha256 != found["oid"]:
            raise HubError(400, "the content does not match its sha256")
        repo.uploads[found["oid"]] = request.body
        return Reply()

    def _resolve(self, request: _Handler, found: re.Match[str]) -> Reply:
        repo = self._find(request, found)
        rev = urllib.parse.unquote(found["rev"])
        commit = repo.at(rev)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        path = urllib.parse.unquote(found["path"])
        if path not in commit.files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return Reply(404, b"Entry not found", headers)
        blob = commit.files[path]
        headers["ETag"] = f'"{blob.etag}"'
        headers["Content-Type"] = "application/octet-stream" if blob.lfs else "text/plain"
        if blob.lfs:
            headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range") or "")
        if asked is None or request.command == "HEAD":
            return Reply(200, blob.content, headers)
        first, last = asked[1], asked[2]
        start = int(first) if first else max(0, blob.size - int(last))
        stop = min(int(last) + 1, blob.size) if first and last else blob.size
        if start >= blob.size:
            return Reply(416, b"", {**headers, "Content-Range": f"bytes */{blob.size}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
        return Reply(206, blob.content[start:stop], headers)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], hub: HubEmulator) -> None:
        super().__init__(address, _Handler)
        self.hub = hub
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def close_connections(self) -> None:
        """End idle keep-alive connections, whose threads would otherwise outlive a test."""
        for request in list(self._open):
            try:
                request.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # its own thread closed it at this moment


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Server
    body: bytes = b""

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self) -> None:
        hub = self.server.hub
        self.body = self._read_body()
        name, act = hub.route(self)
        with hub.store.lock:
            striking = [f for f in hub.faults if f.route == name and f.strikes()]
            struck = striking[0] if striking else None
            reply: Reply | None = None
            if struck is None or struck.kind.endswith("_after"):
                try:
                    reply = act()
                except HubError as error:
                    extra = {"X-Error-Message": error.message}
                    if error.code:
                        extra["X-Error-Code"] = error.code
                    reply = Reply.json({"error": error.message}, error.status)
                    reply.headers.update(extra)
            if struck is not None:
                text = {"error": "a scripted fault"}
                broken = Reply.json(text, struck.status)
                broken.headers.update(struck.headers)
                reply = broken if struck.kind.startswith("status") else None
            status = 0 if reply is None else reply.status
            hub.requests.append(Seen(self.command, self.path, name, status))
        if reply is None:
            self.close_connection = True
            if struck is not None and struck.kind == "hang_after":
                self.connection.recv(1)
            else:
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(reply.status)
        for header, value in reply.headers.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read ``HubEmulator.requests``; nothing goes to standard error."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    port = parser.parse_args().port
    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: done.set())
    with HubEmulator(port=port) as hub:
        facts = {"endpoint": hub.endpoint, "port": hub.port}
        print(
            json.dumps({**facts, "write_token": WRITE_TOKEN, "read_token": READ_TOKEN}), flush=True
        )
        done.wait()


if __name__ == "__main__":
    main()
