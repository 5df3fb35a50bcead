"""The API as it runs: gunicorn and gevent in a process of their own, over sockets."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from spider_sdk.jobs import Queue
from spider_worker.fleet import Fleet
from spider_worker.fleet.keys import ApiKeys
from spider_worker.settings import FleetSettings
from tests.support.api_server import ApiServer
from tests.support.hand_run import HandRun, record
from tests.support.redis_server import RedisServer

CLIENTS = 150
DOCUMENT = {"model": {"provider": "openai", "name": "m"}, "source": {"dataset": "a/b"}}


@pytest.fixture
def server(fleet: Fleet, fleet_settings: FleetSettings, tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(fleet_settings, tmp_path, SSE_HEARTBEAT="0.5") as server:
        yield server


@pytest.fixture
def http(server: ApiServer, fleet: Fleet) -> Iterator[httpx2.Client]:
    _, token = ApiKeys(fleet.redis, fleet.secret_box).create("me")
    limits = httpx2.Limits(max_connections=2 * CLIENTS)
    with httpx2.Client(
        base_url=server.base_url,
        headers={"Authorization": f"Bearer {token}"},
        timeout=30,
        limits=limits,
        trust_env=False,
    ) as client:
        assert client.get("/readyz").status_code == 200
        yield client


def submit(fleet: Fleet) -> str:
    return fleet.jobs.submit("me", DOCUMENT, {}, queue=Queue.OFFLINE_GEN).job_id


def eventually(probe: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not probe():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


class Follower(threading.Thread):
    """Follows a job to its end, resuming after the last id; ``cuts`` connections are dropped
    by the client itself after a few messages."""

    def __init__(self, http: httpx2.Client, job: str, cuts: int) -> None:
        super().__init__()
        self._http = http
        self._job = job
        self._cuts = cuts
        self.offsets: list[int] = []
        self.end: dict[str, Any] | None = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            while self.end is None:
                self._once()
        except BaseException as error:  # noqa: BLE001 - shown by the test
            self.error = error

    def _once(self) -> None:
        headers = {"Last-Event-ID": f"{self.offsets[-1]}-1"} if self.offsets else {}
        left = random.randint(1, 20) if self._cuts > 0 else 10**9
        self._cuts -= 1
        kind = ""
        try:
            with self._http.stream(
                "GET", f"/v1/jobs/{self._job}/events", headers=headers
            ) as answer:
                assert answer.status_code == 200
                for line in answer.iter_lines():
                    if line.startswith("event: "):
                        kind = line[7:]
                    elif line.startswith("data: "):
                        if kind == "end":
                            self.end = json.loads(line[6:])
                            return
                        self.offsets.append(json.loads(line[6:])["offset"])
                        left -= 1
                        if not left:
                            return
        except (httpx2.RemoteProtocolError, httpx2.ReadError):
            pass  # cut by the server's side; come back


def test_many_clients_cut_at_random_miss_and_repeat_nothing(
    fleet: Fleet, server: ApiServer, http: httpx2.Client
) -> None:
    job = submit(fleet)
    followers = [Follower(http, job, cuts=number % 4) for number in range(CLIENTS)]
    for number in range(80):
        fleet.events.append(job, "info", "note", str(number))
        if number == 40:
            # The API's own connection to the live channel breaks too.
            fleet.redis.client_kill_filter(_type="pubsub")
    assert http.get("/healthz").status_code == 200  # nobody is starved by the followers
    eventually(lambda: all(len(f.offsets) == 81 for f in followers), "all events at all clients")
    fleet.jobs.cancel(job)
    for follower in followers:
        follower.join(30)
        assert follower.error is None
        assert follower.offsets == list(range(82))
        assert follower.end is not None
        assert follower.end["status"] == "cancelled"
    assert resident_mb(server) < 200
    text = http.get("/metrics").text
    assert "spider_sse_clients 0.0" in text


def resident_mb(server: ApiServer) -> float:
    """Resident memory of gunicorn's processes."""
    pids = [server.pid]
    for task in Path(f"/proc/{server.pid}/task").iterdir():
        pids += [int(pid) for pid in (task / "children").read_text().split()]
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1])
    return total / 1024


def test_a_client_that_takes_nothing_is_dropped_and_others_go_on(
    fleet: Fleet, fleet_settings: FleetSettings, tmp_path: Path
) -> None:
    """It holds neither the API's memory nor its connection: its stream is cut."""
    import socket

    _, token = ApiKeys(fleet.redis, fleet.secret_box).create("me")
    job = submit(fleet)
    with ApiServer(
        fleet_settings, tmp_path, SSE_BACKLOG="50", SSE_SEND_TIMEOUT="1", SSE_HEARTBEAT="0.5"
    ) as server:
        host, port = server.base_url.removeprefix("http://").split(":")
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((host, int(port)))
            request = f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: x\r\n"
            request += f"Authorization: Bearer {token}\r\n\r\n"
            slow.sendall(request.encode())
            headers = {"Authorization": f"Bearer {token}"}

            def clients() -> float:
                url = f"{server.base_url}/metrics"
                text = httpx2.get(url, headers=headers, timeout=30).text
                line = next(x for x in text.splitlines() if x.startswith("spider_sse_clients "))
                return float(line.split()[1])

            eventually(lambda: clients() == 1, "the slow client follows")
            for number in range(150):
                fleet.events.append(job, "info", "note", str(number), {"pad": "x" * 60_000})
            eventually(lambda: clients() == 0, "the slow client is cut")


def test_sigterm_ends_streams_and_a_new_server_takes_them_up(
    fleet: Fleet, fleet_settings: FleetSettings, server: ApiServer, http: httpx2.Client
) -> None:
    job = submit(fleet)
    with http.stream("GET", f"/v1/jobs/{job}/events") as answer:
        received = answer.iter_lines()
        while not next(received).startswith("data:"):
            pass
        assert server.stop() == 0
        list(received)  # ends by itself, whole
    assert "graceful timeout" not in server.log.read_text(), "streams were waited for"


def test_submits_survive_an_outage_of_redis(
    redis_server: RedisServer, server: ApiServer, http: httpx2.Client
) -> None:
    body = {
        "job": {
            "model": {"provider": "openai", "name": "m", "base_url": "https://models.example/v1"},
            "source": {"dataset": "org/data", "field": "question"},
        }
    }
    headers = {"Idempotency-Key": "once"}
    redis_server.stop(signal.SIGKILL)
    try:
        refused = http.post("/v1/jobs", json=body, headers=headers)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert http.get("/healthz").status_code == 200
        assert http.get("/readyz").status_code == 503
    finally:
        redis_server.start()
    eventually(lambda: http.get("/readyz").status_code == 200, "ready again")
    assert http.post("/v1/jobs", json=body, headers=headers).status_code == 201
    assert http.post("/v1/jobs", json=body, headers=headers).status_code == 200
    assert len(http.get("/v1/jobs").json()["jobs"]) == 1


def test_a_stream_survives_an_outage_of_redis(
    fleet: Fleet, redis_server: RedisServer, http: httpx2.Client
) -> None:
    job = submit(fleet)
    follower = Follower(http, job, cuts=0)
    eventually(lambda: follower.offsets == [0], "following")
    redis_server.stop(signal.SIGKILL)
    redis_server.start()
    fleet.events.append(job, "info", "note", "after")
    eventually(lambda: follower.offsets == [0, 1], "the event after the outage")
    fleet.jobs.cancel(job)
    follower.join(30)
    assert follower.error is None
    assert follower.offsets == [0, 1, 2]


def test_uploads_of_unknown_length_and_large_downloads(fleet: Fleet, http: httpx2.Client) -> None:
    data = b"0123456789abcdef" * 500_000

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(data), 100_000):
            yield data[start : start + 100_000]

    sha = hashlib.sha256(data).hexdigest()
    assert http.put(f"/v1/inputs/{sha}", content=chunks()).status_code == 201
    assert http.head(f"/v1/inputs/{sha}").status_code == 200
    assert fleet.inputs.path(sha).read_bytes() == data
    # A second upload is answered without being read, and the connection stays usable.
    assert http.put(f"/v1/inputs/{sha}", content=chunks()).status_code == 200
    wrong = http.put(f"/v1/inputs/{'0' * 64}", content=chunks())
    assert wrong.status_code == 422
    job = submit(fleet)
    records = [record(n, text="z" * 1000) for n in range(5000)]
    HandRun(fleet, job, units=1).work(*records)
    answer = http.get(f"/v1/jobs/{job}/result")
    assert answer.json()["artifact"] == records
    path = f"/v1/jobs/{job}/artifacts/shard-00000.jsonl"
    part = http.get(path, headers={"Range": "bytes=100-299"})
    assert part.status_code == 206
    assert part.content == http.get(path).content[100:300]


def test_the_reaper_runs_in_the_server(fleet: Fleet, server: ApiServer) -> None:
    """A job whose hint was lost is hinted at again: its queue in Redis is not empty."""
    submit(fleet)
    fleet.redis.delete("spider:offline-gen")
    eventually(lambda: fleet.redis.llen("spider:offline-gen") > 0, "a new hint", seconds=40)


def test_two_processes_behind_one_port(
    fleet: Fleet, fleet_settings: FleetSettings, tmp_path: Path
) -> None:
    """Events reach followers at either, and the figures are those of both."""
    _, token = ApiKeys(fleet.redis, fleet.secret_box).create("me")
    job = submit(fleet)
    with (
        ApiServer(fleet_settings, tmp_path, API_WORKERS="2") as server,
        httpx2.Client(
            base_url=server.base_url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=30,
            limits=httpx2.Limits(max_connections=50, max_keepalive_connections=0),
        ) as http,
    ):
        followers = [Follower(http, job, cuts=1) for _ in range(20)]
        for number in range(30):
            fleet.events.append(job, "info", "note", str(number))
        fleet.jobs.cancel(job)
        for follower in followers:
            follower.join(30)
            assert follower.error is None
            assert follower.offsets == list(range(32))
        for _ in range(10):
            lines = http.get("/metrics").text.splitlines()
            (sent,) = [line for line in lines if line.startswith("spider_sse_events_total ")]
            assert float(sent.split()[1]) >= 20 * 32
