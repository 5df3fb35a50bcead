"""The folder that holds everything of one embedded fleet.

::

    .spider/
    ├── lock             held (flock) by the ``spider up`` that uses the folder; its pid inside
    ├── client.toml      base_url and api_key for ``SPIDER_CONFIG``            (mode 600)
    ├── env              the children's SPIDER_* as ``export`` lines           (mode 600)
    ├── api.key          the API key that the fleet made for its owner         (mode 600)
    ├── secret.key       encrypts job secrets, hashes API keys                 (mode 600)
    ├── redis/           redis.conf (mode 600) and the append-only file
    ├── artifacts/       inputs and results
    ├── worker/          device locks and scratch data
    ├── envs/            environments of runtime.packages
    └── logs/            redis.log, api.log, worker-1.log …
"""

from __future__ import annotations

__all__ = ["StateFolder"]

import fcntl
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from spider_sdk.errors import UsageError


class StateFolder:
    """A context manager: entering makes the folder and takes its lock.

    The lock is the kernel's (flock), so that one left by a killed process is no lock; the
    pid in the file only serves the message.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock: int | None = None

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise UsageError(
                f"{self.path}: cannot hold a fleet's state: {error.strerror}"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise UsageError(
                f"{self.path} is in use by another embedded fleet (process {holder}): stop that "
                "one with Ctrl-C, or give this one a folder of its own with --state"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._lock = descriptor
        for name in ("redis", "artifacts", "worker", "envs", "logs"):
            (self.path / name).mkdir(exist_ok=True, mode=0o700)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._lock is not None:
            os.close(self._lock)  # and the lock with it; the file stays, or two could hold "it"
            self._lock = None

    def clear(self) -> None:
        """Forget everything in the folder, except for the lock that is held on it."""
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    @property
    def redis(self) -> Path:
        return self.path / "redis"

    @property
    def artifacts(self) -> Path:
        return self.path / "artifacts"

    @property
    def worker(self) -> Path:
        return self.path / "worker"

    @property
    def envs(self) -> Path:
        return self.path / "envs"

    @property
    def secret_key(self) -> Path:
        return self.path / "secret.key"

    @property
    def client_config(self) -> Path:
        return self.path / "client.toml"

    @property
    def env_file(self) -> Path:
        return self.path / "env"

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def read_api_key(self) -> str | None:
        """The key of an earlier start, None on the first."""
        path = self.path / "api.key"
        return path.read_text(encoding="utf-8").strip() if path.exists() else None

    def write_api_key(self, key: str) -> None:
        self.write_private(self.path / "api.key", key + "\n")

    def write_client_config(self, base_url: str, key: str) -> None:
        """What ``SPIDER_CONFIG=<state>/client.toml`` makes ``spider`` use."""
        text = f'base_url = "{base_url}"\napi_key = "{key}"\n'
        self.write_private(self.client_config, text)

    def write_env(self, variables: Mapping[str, str]) -> None:
        """For ``. <state>/env`` and then ``celery -A spider_worker inspect active``."""
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()]
        self.write_private(self.env_file, "".join(lines))

    @staticmethod
    def write_private(path: Path, text: str) -> None:
        """Replace the file whole, readable by its owner alone from its first byte on."""
        temporary = path.with_name(f".{path.name}.new")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
