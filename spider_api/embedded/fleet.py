"""The embedded fleet: a Redis, the API and workers of one's own, under one folder.

Started in the order in which they need each other, each waited for by what it is there to do
(PING, ``/readyz``, Celery's ping), and stopped the other way round. Should this process be
killed, its programs die with it (``tether``); what jobs were running is picked up at the next
start from the same folder, when their leases have run out.
"""

from __future__ import annotations

__all__ = ["EmbeddedFleet", "Report"]

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from spider_api.embedded.options import HOST, FleetOptions, child_environment, fleet_variables
from spider_api.embedded.orphans import Orphans
from spider_api.embedded.ports import free_port, require_free
from spider_api.embedded.process import Program, StopStep
from spider_api.embedded.readiness import api_ready, died, until, workers_ready
from spider_api.embedded.redis import RedisServer, find_server, redis_version
from spider_api.embedded.state import StateFolder
from spider_sdk.errors import ServerUnreachable
from spider_worker.fleet.broker import make_app
from spider_worker.fleet.connection import connect
from spider_worker.fleet.keys import ApiKeys
from spider_worker.fleet.secret_box import SecretBox
from spider_worker.settings import FleetSettings

Report = Callable[[str, str], None]
"""Called with a part (``redis``, ``api``, ``worker``) and what became of it."""

KEY_OWNER = "embedded"
ORPHAN_SECONDS = 10.0  #: that a runner has to exit once its worker is gone
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class EmbeddedFleet:
    """A context manager: entering starts everything, leaving stops it. Use it from the main
    thread: the programs die with the thread that started them, and signals arrive there."""

    def __init__(self, options: FleetOptions, report: Report) -> None:
        self.options = options
        self._report = report
        self._state = StateFolder(options.state)
        self._programs: list[Program] = []
        self._stack = contextlib.ExitStack()
        self._orphans = Orphans()
        self._stopping = False
        self.base_url = ""  #: known once started
        self.api_key = ""

    @property
    def state(self) -> StateFolder:
        return self._state

    @property
    def programs(self) -> tuple[Program, ...]:
        """What runs, in the order of starting."""
        return tuple(self._programs)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._signals())
            stack.enter_context(self._state)
            stack.callback(self._stop_programs)
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def wait(self) -> None:
        """Return never; raise ServerUnreachable when a program ends by itself, KeyboardInterrupt
        on Ctrl-C, SIGTERM or SIGHUP."""
        while True:
            for program in self._programs:
                if not program.running:
                    raise ServerUnreachable(died(program))
            time.sleep(0.5)

    def _start(self) -> None:
        port = self.options.port or free_port(HOST)
        require_free(port, HOST)
        binary = find_server()
        redis = RedisServer(self._state, binary, os.environ)
        self._programs.append(redis.program)
        redis.start()
        until(redis.answers, [redis.program], "Redis", seconds=self.options.start_timeout)
        self._report("redis", f"{redis_version(binary)} on {HOST}:{redis.port}, append-only file")

        self.base_url = f"http://{HOST}:{port}"
        self.api_key = self._own_key(redis.url)
        self._state.write_client_config(self.base_url, self.api_key)
        self._state.write_env(fleet_variables(self.options, self._state, redis.url, os.environ))
        env = child_environment(self.options, self._state, redis.url, os.environ)
        api = self._api(port, env)
        workers = [self._worker(number, env) for number in range(1, self.options.workers + 1)]
        for program in (api, *workers):
            self._programs.append(program)
            program.start()
        self._await_api(api)
        self._await_workers(workers, redis.url)

    def _await_api(self, api: Program) -> None:
        base_url, seconds = self.base_url, self.options.start_timeout
        until(lambda: api_ready(base_url), self._programs, "the API", seconds=seconds)
        self._report("api", f"{base_url} (process {api.pid})")

    def _await_workers(self, workers: list[Program], redis_url: str) -> None:
        app = make_app(FleetSettings(redis_url=redis_url))
        names = [f"{program.name}@embedded" for program in workers]
        try:
            until(
                lambda: workers_ready(app, names),
                self._programs,
                "a worker",
                seconds=self.options.start_timeout,
            )
        finally:
            app.close()
        for program in workers:
            self._report(program.name, f"serving {self.options.queues} (process {program.pid})")

    def _own_key(self, redis_url: str) -> str:
        """The key of the last start where this Redis still knows it, else a new one."""
        settings = FleetSettings(redis_url=redis_url, secret_key_file=self._state.secret_key)
        client = connect(redis_url)
        try:
            keys = ApiKeys(client, SecretBox.from_settings(settings))
            key = self._state.read_api_key()
            if key is None or keys.authenticate(key) is None:
                _, key = keys.create(KEY_OWNER, "made by spider up")
                self._state.write_api_key(key)
        finally:
            client.close()
        return key

    def _api(self, port: int, env: dict[str, str]) -> Program:
        command = [sys.executable, "-m", "spider_api.server", "--host", HOST, "--port", str(port)]
        return Program(
            "api",
            command,
            env=env,
            cwd=Path.cwd(),
            log=self._state.log("api"),
            on_death=signal.SIGTERM,
            # Graceful while requests end; then at once, since followers hold theirs for hours.
            steps=(StopStep(signal.SIGTERM, 5.0), StopStep(signal.SIGQUIT, 5.0)),
        )

    def _worker(self, number: int, env: dict[str, str]) -> Program:
        name = f"worker-{number}"
        command = [sys.executable, "-m", "celery", "-A", "spider_worker", "worker"]
        command += ["-Q", self.options.queues, "--pool", "threads", "--concurrency", "1"]
        command += ["-n", f"{name}@embedded", "--loglevel", "INFO"]
        return Program(
            name,
            command,
            # Relative paths in a job (config/demo/adder) are meant from where one stands.
            env=env,
            cwd=Path.cwd(),
            log=self._state.log(name),
            # Warm first: the units that run are given back. Its runners notice its end by
            # their dead-man pipes.
            steps=(StopStep(signal.SIGTERM, 12.0), StopStep(signal.SIGQUIT, 5.0)),
        )

    def _stop_programs(self) -> None:
        """Workers with their runners, then the API, then Redis, which the others need to say
        goodbye to."""
        self._stopping = True
        for program in reversed(self._programs):
            if program.running:
                self._report(program.name, "stopping")
            program.stop()
            running = {other.pid for other in self._programs if other.pid and other.running}
            self._orphans.end(running, ORPHAN_SECONDS)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal is a KeyboardInterrupt; one while stopping kills what still runs."""

        def handle(_number: int, _frame: FrameType | None) -> None:
            if not self._stopping:
                raise KeyboardInterrupt
            for program in self._programs:
                program.kill()

        before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
