"""Repositories that come from an address: git itself fetches them, from nowhere else."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import http.server
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.errors import FatalJobError, WorkspaceError
from spider_worker.pipelines.swe_agent.checks import check_remotes
from spider_worker.swe_tasks.base import Origin, Task
from spider_worker.workspaces.origin import check_out
from tests.support.boxes import bare_task


class Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/moved"))
            self.end_headers()
        else:
            super().do_GET()


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """Of a server with a repository at ``/x.git``."""
    bare_task(tmp_path / "x")
    served = tmp_path / "served"
    clone = ["git", "clone", "-q", "--bare", str(tmp_path / "x"), str(served / "x.git")]
    subprocess.run(clone, check=True)
    subprocess.run(["git", "update-server-info"], cwd=served / "x.git", check=True)
    handler = functools.partial(Server, directory=str(served))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def origin(address: str) -> Task:
    return Task("i-1", "tests/bare", "p", Origin("git", address))


def test_git_reaches_what_the_name_was_found_to_be(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = socket.getaddrinfo("127.0.0.1", port, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    task = origin(f"http://repositories.invalid:{port}/x.git")
    asyncio.run(check_out(task, tmp_path / "tree", allow_private=True))
    assert (tmp_path / "tree" / "a.txt").read_text() == "one\n"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:{port}/x.git", "leads to 127.0.0.1, a private address"),
        ("http://localhost:{port}/x.git", "a private address"),
        ("https://169.254.169.254/x.git", "leads to 169.254.169.254, a link-local or metadata"),
        ("git@127.0.0.1:x.git", "a private address"),
        ("file://{folder}/served/x.git", "fetched by https, http or ssh"),
        ("http://nobody.invalid/x.git", "nobody.invalid is not found"),
    ],
)
def test_what_no_job_may_reach_is_not_fetched(
    port: int, tmp_path: Path, address: str, said: str
) -> None:
    task = origin(address.format(port=port, folder=tmp_path))
    with pytest.raises(WorkspaceError, match=said):
        asyncio.run(check_out(task, tmp_path / "tree"))
    assert not (tmp_path / "tree").exists()
    with pytest.raises(FatalJobError, match=said):
        check_remotes([task], allow_private=False)


def test_metadata_services_are_nobodys() -> None:
    with pytest.raises(FatalJobError, match="link-local or metadata"):
        check_remotes([origin("https://169.254.169.254/x.git")], allow_private=True)


def test_a_redirect_leads_nowhere(port: int, tmp_path: Path) -> None:
    task = origin(f"http://127.0.0.1:{port}/moved/x.git")
    with pytest.raises(WorkspaceError, match="git clone"):
        asyncio.run(check_out(task, tmp_path / "tree", allow_private=True))


def test_a_commit_that_is_not_there_is_not_sought_elsewhere(port: int, tmp_path: Path) -> None:
    task = dataclasses.replace(origin(f"http://127.0.0.1:{port}/x.git"), base_commit="0" * 40)
    with pytest.raises(WorkspaceError, match="has no commit 0000"):
        asyncio.run(check_out(task, tmp_path / "tree", allow_private=True))
