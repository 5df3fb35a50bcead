"""A whole fleet for a test, without the API: Redis, reaper, real Celery workers, real runners."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from spider_sdk.jobs import JobStatus, Queue
from spider_worker.fleet import Fleet, JobRecord
from spider_worker.settings import FleetSettings
from tests.support.redis_server import RedisServer

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]


def eventually(probe: Callable[[], T], what: str, seconds: float = 60) -> T:
    """Poll until ``probe`` gives something true, and return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := probe():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds:g} s: {what}")


class Worker:
    """A Celery worker process, in a session of its own."""

    def __init__(self, name: str, env: Mapping[str, str], folder: Path, *options: str) -> None:
        self.log = folder / f"{name}.log"
        command = [sys.executable, "-m", "celery", "-A", "spider_worker", "worker"]
        command += ["-n", f"{name}@%h", "--loglevel", "INFO", *options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=dict(env), cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def runners(self) -> list[int]:
        """The runner processes that this worker started and that live."""
        return [pid for pid in children(self.pid) if "spider_worker.runner" in command_line(pid)]

    def kill_all(self) -> None:
        """kill -9 of the worker and its runners at once, as when the host dies."""
        pids = [self.pid, *self.runners()]
        for pid in pids:
            kill(pid)
        self.process.wait(10)

    def stop(self) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill_all()


@dataclasses.dataclass
class Harness:
    fleet: Fleet
    redis: RedisServer
    folder: Path
    env: dict[str, str]
    workers: list[Worker] = dataclasses.field(default_factory=list)

    def worker(self, *options: str, wait: bool = True) -> Worker:
        """Start a worker; by default wait until it consumes."""
        number = len(self.workers)
        worker = Worker(f"w{number}", self.env, self.folder, *(options or ("-Q", "gpu")))
        self.workers.append(worker)
        if wait:
            eventually(
                lambda: worker.process.poll() is not None or b" ready." in worker.log.read_bytes(),
                f"worker {number} ready: {worker.log}",
            )
        return worker

    def submit(
        self,
        document: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
        queue: Queue = Queue.OFFLINE_GEN,
    ) -> str:
        return self.fleet.jobs.submit("me", document, env or {}, queue=queue).job_id

    def wait(self, job_id: str, *statuses: JobStatus, seconds: float = 90) -> JobRecord:
        """Wait for one of ``statuses`` (any end, by default)."""

        def reached() -> JobRecord | None:
            record = self.fleet.jobs.get(job_id)
            good = record.status in statuses if statuses else record.status.is_terminal
            return record if good else None

        try:
            return eventually(reached, f"job {job_id} in {statuses or 'an end state'}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story(job_id)}") from None

    def records(self, job_id: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.fleet.results.records(job_id)]

    def story(self, job_id: str) -> str:
        """What happened, for a failure's message."""
        events = [str(event) for event in self.fleet.events.read(job_id).events[-30:]]
        logs = [line.decode("utf-8", "replace") for line in self.fleet.artifacts.logs(job_id)]
        workers = [worker.log.read_text()[-2000:] for worker in self.workers]
        return "\n".join([*events, "".join(logs[-40:]), *workers])


def start(folder: Path, **settings: str) -> Iterator[Harness]:
    """A generator for fixtures: yields a harness, and leaves no process behind."""
    (folder / "redis").mkdir()
    with RedisServer(folder / "redis") as server:
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SPIDER_")},
            "SPIDER_REDIS_URL": server.url,
            "SPIDER_ARTIFACTS": str(folder / "artifacts"),
            "SPIDER_STATE": str(folder / "state"),
            "SPIDER_ENV_CACHE": str(folder / "envs"),
            "SPIDER_SECRET_KEY_FILE": str(folder / "secret.key"),
            "SPIDER_LEASE": "2",
            "SPIDER_BACKOFF": "0.2",
            "SPIDER_HINT_AFTER": "1",
            "SPIDER_ALLOW_PRIVATE_URLS": "true",
            **settings,
        }
        fleet = Fleet.connect(
            FleetSettings(
                redis_url=server.url,
                artifacts=folder / "artifacts",
                secret_key_file=folder / "secret.key",
                lease=float(env["SPIDER_LEASE"]),
                backoff=float(env["SPIDER_BACKOFF"]),
                hint_after=float(env["SPIDER_HINT_AFTER"]),
            )
        )
        harness = Harness(fleet, server, folder, env)
        stop = threading.Event()
        reaper = threading.Thread(target=fleet.reaper.run, args=(stop,))
        reaper.start()
        try:
            yield harness
        finally:
            stop.set()
            for worker in harness.workers:
                worker.stop()
            reaper.join(10)
            fleet.close()


def children(pid: int) -> list[int]:
    """All living descendants of a process."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (OSError, IndexError):
                continue  # it ended while we looked
            if fields[0] != "Z":
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    todo = [pid]
    while todo:
        below = parents.get(todo.pop(), [])
        found += below
        todo += below
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
