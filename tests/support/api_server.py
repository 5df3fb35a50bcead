"""The real API in a process of its own: gunicorn with gevent, on a free port."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType

from spider_worker.settings import FleetSettings

_LISTENING = re.compile(r"Listening at: (http://127\.0\.0\.1:\d+)")
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # past any proxy
_LOADED = 60  #: seconds that the first answer may take, on a machine with much else to do


class ApiServer:
    """A context manager. ``settings`` are SPIDER_* variables without their prefix."""

    def __init__(self, fleet: FleetSettings, folder: Path, **settings: str) -> None:
        self.log = folder / "api.log"
        self.base_url = ""
        self._env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SPIDER_")},
            "SPIDER_REDIS_URL": fleet.redis_url,
            "SPIDER_ARTIFACTS": str(fleet.artifacts),
            "SPIDER_SECRET_KEY_FILE": str(fleet.secret_key_file),
            "SPIDER_CONFIG": str(folder / "no-config.toml"),
            **{f"SPIDER_{name}": value for name, value in settings.items()},
        }
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self, *options: str) -> None:
        command = [sys.executable, "-m", "spider_api.server", "--port", "0", *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=self._env, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            found = _LISTENING.search(self.log.read_text())
            if found:
                self.base_url = found.group(1)
                self._wait_for_the_app()
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"the API did not start:\n{self.log.read_text()}")

    def _wait_for_the_app(self) -> None:
        """The first request waits until the worker has loaded it; a test's own client has less
        patience."""
        assert self.process is not None
        try:
            _OPENER.open(f"{self.base_url}/healthz", timeout=_LOADED).close()
        except OSError as error:
            self.process.kill()
            self.process.wait(10)
            raise AssertionError(f"the API did not answer:\n{self.log.read_text()}") from error

    def stop(self) -> int:
        """SIGTERM, and its exit code. Killed if it does not end."""
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
            raise

    def __enter__(self) -> ApiServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()
