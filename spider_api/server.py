"""``spider-api``: the API under gunicorn.

gevent's worker class, because a client that follows a job holds its connection for hours: a
thread each would starve everybody else. The app is imported in the worker process alone, after
gevent has patched the standard library there, so this module imports none of it.
"""

from __future__ import annotations

__all__ = ["Server", "main"]

import contextlib
import dataclasses
import logging
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from gunicorn.app.base import BaseApplication
from gunicorn.workers.ggevent import GeventWorker

from spider_api.settings import ApiSettings
from spider_sdk import settings as settings_of
from spider_sdk.errors import ConfigError, SpiderError

MIN_CONNECTIONS = 2000
GRACE = 5  #: seconds that requests get to end after SIGTERM
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  #: prometheus_client's own variable
METRICS_PREFIX = "spider-metrics-"
BLOCKED = 120  #: seconds without a sign of life after which gunicorn replaces a process


class ApiWorker(GeventWorker):  # type: ignore[misc]
    """Stops as soon as its requests are answered. Left to itself gunicorn waits its whole grace
    for streams, whose clients would rather come back to the next process, and for connections
    that a client merely keeps open."""

    spider: Any = None  #: the app's Api, once there is one

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._open: set[Any] = set()
        self._busy: set[Any] = set()

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        self._open.add(client)
        try:
            super().handle(listener, client, addr)
        finally:
            self._open.discard(client)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        self._busy.add(sock)
        try:
            return super().handle_request(listener_name, req, sock, addr)
        finally:
            self._busy.discard(sock)
            if not self.alive:
                self._end(sock)

    def handle_exit(self, sig: int, frame: Any) -> None:
        import gevent

        super().handle_exit(sig, frame)
        gevent.spawn(self._hurry)  # not here: a signal handler must not wait for a lock

    def _hurry(self) -> None:
        if self.spider is not None:
            self.spider.close()
        for client in self._open - self._busy:
            self._end(client)

    @staticmethod
    def _end(client: Any) -> None:
        """Let no further request come in; what was answered still goes out."""
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RD)


class Server(BaseApplication):  # type: ignore[misc]
    """gunicorn with the API in it. ``run`` never returns."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings
        super().__init__()

    def load_config(self) -> None:
        settings = self._settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        for name, value in {
            "bind": f"{host}:{settings.port}",
            "workers": settings.workers,
            "worker_class": f"{__name__}.ApiWorker",
            "worker_connections": max(settings.connections, MIN_CONNECTIONS),
            "proc_name": "spider-api",
            "timeout": BLOCKED,
            "graceful_timeout": GRACE,
            "keepalive": 30,
            "control_socket_disable": True,
            "preload_app": False,
            "post_worker_init": _start,
            "child_exit": _forget,
            "on_exit": _clean,
        }.items():
            # gunicorn before 25 has no control socket to turn off.
            if name in self.cfg.settings:
                self.cfg.set(name, value)

    def load(self) -> Any:
        from spider_api.app import create_app

        _log_to_stderr()
        return create_app(self._settings)


def _start(worker: Any) -> None:
    """In a worker process, once its app is there."""
    from spider_api.context import of

    worker.spider = api = of(worker.wsgi)
    if api.settings.reaper:
        api.start_reaper()


def _forget(_arbiter: Any, worker: Any) -> None:
    """In the parent: a process that ended counts no clients any more."""
    if METRICS_FOLDER in os.environ:
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def _clean(_arbiter: Any) -> None:
    """In the parent, at the end."""
    folder = os.environ.get(METRICS_FOLDER, "")
    if Path(folder).name.startswith(METRICS_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("spider_api", "spider_worker", "spider_sdk"):
        log = logging.getLogger(name)
        log.handlers[:] = [handler]
        log.setLevel(logging.INFO)
        log.propagate = False


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--host", help="Address to listen on (SPIDER_API_HOST, default 127.0.0.1).")
@click.option(
    "--port", type=click.IntRange(0, 65535), help="Port (SPIDER_API_PORT, default 9000; 0: any)."
)
@click.option(
    "--workers", type=click.IntRange(1), help="Processes (SPIDER_API_WORKERS, default 1)."
)
def main(host: str | None, port: int | None, workers: int | None) -> None:
    """Serve the Spider API until SIGTERM or Ctrl-C."""
    given: dict[str, Any] = {"host": host, "port": port, "workers": workers}
    try:
        settings = settings_of.load(ApiSettings)
        settings = dataclasses.replace(
            settings, **{name: value for name, value in given.items() if value is not None}
        )
        if settings.workers > 1 and METRICS_FOLDER not in os.environ:
            os.environ[METRICS_FOLDER] = tempfile.mkdtemp(prefix=METRICS_PREFIX)
        Server(settings).run()
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    except SpiderError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
