"""``Client`` against the real API on a real Redis; only the socket is left out."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from spider_api.app import create_app
from spider_api.context import of
from spider_api.settings import ApiSettings
from spider_sdk import AppConfig, Client
from spider_sdk.cli.main import run
from spider_sdk.errors import ConfigError, Conflict, NotFound, Unauthorized
from spider_sdk.jobs import Queue
from spider_worker.fleet import Fleet
from spider_worker.settings import FleetSettings
from tests.support.redis_server import RedisServer

JOB: dict[str, Any] = {
    "model": {"provider": "vllm", "name": "Qwen/Qwen2.5-7B-Instruct"},
    "source": {"dataset": "openai/gsm8k", "field": "question"},
}


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def fleet(redis_server: RedisServer, tmp_path: Path) -> Iterator[Fleet]:
    settings = FleetSettings(
        redis_url=redis_server.url,
        artifacts=tmp_path / "artifacts",
        secret_key_file=tmp_path / "secret.key",
        event_history=100,
    )
    fleet = Fleet.connect(settings)
    fleet.redis.flushall()
    yield fleet
    fleet.close()


@pytest.fixture
def connect(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Client]]:
    for name in ("HF_TOKEN", "SPIDER_API_KEY", "SPIDER_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SPIDER_CONFIG", str(tmp_path / "user.toml"))
    monkeypatch.chdir(tmp_path)
    app = create_app(ApiSettings(sse_heartbeat=0.05), fleet)
    made: list[Client] = []

    def build(job: dict[str, Any] | None = JOB, owner: str = "ada", **options: Any) -> Client:
        options.setdefault("api_key", of(app).keys.create(owner)[1])
        config = None if job is None else AppConfig.from_dict({"job": job})
        config = options.pop("config", config)
        made.append(Client(config, transport=httpx2.WSGITransport(app=app), **options))
        return made[-1]

    yield build
    for client in made:
        client.close()
    of(app).close()


def test_a_job_from_submit_to_its_end(connect: Callable[..., Client]) -> None:
    client = connect()
    submitted = client.submit_job()
    job_id = submitted["job_id"]
    assert submitted["status"] == "queued"
    assert [job["job_id"] for job in client.list_jobs(status="queued")] == [job_id]

    seen: list[Any] = []
    running = threading.Event()

    def noticed(document: Any) -> None:
        seen.append(document)
        running.set()

    def stop() -> None:
        running.wait(30)
        connect().cancel_job(job_id)

    stopper = threading.Thread(target=stop)
    stopper.start()
    final = client.poll_job(job_id, timeout=60, on_update=noticed)
    stopper.join()
    assert final["status"] == "cancelled"
    codes = [event["code"] for document in seen for event in document["events"]]
    assert codes[0] == "job.queued"
    assert codes[-1] == "job.cancelled"
    assert [event.code for event in client.events(job_id)] == codes
    assert client.logs(job_id) == ""
    assert client.artifacts(job_id) == []
    with pytest.raises(NotFound, match="no results yet"):
        client.download_result(job_id, "r.json")


def test_polling_tells_the_same(connect: Callable[..., Client]) -> None:
    client = connect()
    job_id = client.submit_job()["job_id"]
    client.cancel_job(job_id)
    seen: list[Any] = []
    final = client.poll_job(job_id, interval=0.01, stream_events=False, on_update=seen.append)
    assert final["status"] == "cancelled"
    codes = [event["code"] for document in seen for event in document["events"]]
    assert codes == [event.code for event in client.events(job_id)]


def test_a_retry_is_followed_past_the_first_end(connect: Callable[..., Client]) -> None:
    client = connect()
    job_id = client.submit_job()["job_id"]
    client.cancel_job(job_id)
    assert client.retry_job(job_id)["status"] == "queued"
    with pytest.raises(Conflict, match="queued"):
        client.retry_job(job_id)
    client.cancel_job(job_id)
    codes = [event.code for event in client.events(job_id)]
    assert codes.count("job.cancelled") == 2


def test_trimmed_events_are_skipped_over(connect: Callable[..., Client], fleet: Fleet) -> None:
    client = connect()
    job_id = client.submit_job()["job_id"]
    for number in range(1500):
        fleet.events.append(job_id, "info", "note", str(number))
    client.cancel_job(job_id)
    offsets = [event.offset for event in client.events(job_id)]
    assert offsets[0] > 0
    assert offsets == list(range(offsets[0], offsets[0] + len(offsets)))
    end = client.get_job_status(job_id, since=offsets[-1] + 1)
    assert end["events"] == []


def test_submitting_twice_with_one_key(connect: Callable[..., Client]) -> None:
    client = connect()
    first = client.submit_job(idempotency_key="k")
    assert client.submit_job(idempotency_key="k")["job_id"] == first["job_id"]
    with pytest.raises(Conflict, match="another body"):
        client.submit_job({"generation": {"seed": 3}}, idempotency_key="k")


def test_local_data_reaches_the_server(
    connect: Callable[..., Client], fleet: Fleet, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?"}\n')
    source = {"dataset": "./rows.jsonl", "field": "question"}
    client = connect({**JOB, "source": source})
    job_id = client.submit_job()["job_id"]
    client.submit_job()
    (entry,) = client.get_job_status(job_id)["job"]["source"]["inputs"]
    assert entry["name"] == "rows.jsonl"
    assert fleet.inputs.path(entry["sha256"]).read_text() == '{"question": "1+1?"}\n'


def test_secrets_stay_out_of_the_record(connect: Callable[..., Client], fleet: Fleet) -> None:
    model = {"provider": "openai", "name": "m", "base_url": "https://8.8.8.8/v1"}
    client = connect({**JOB, "model": {**model, "api_key": "canary-1"}})
    job_id = client.submit_job()["job_id"]
    (name,) = client.forwarded
    document = client.get_job_status(job_id)
    assert "canary-1" not in str(document)
    assert document["job"]["model"]["api_key_env"] == name
    assert fleet.jobs.secrets(job_id) == {name: "canary-1"}
    client.cancel_job(job_id)
    assert client.retry_job(job_id)["status"] == "queued"
    assert fleet.jobs.secrets(job_id) == {name: "canary-1"}


def test_what_the_server_refuses(connect: Callable[..., Client]) -> None:
    with pytest.raises(ConfigError, match="trust_remote_code"):
        connect(
            {**JOB, "model": {**JOB["model"], "parameters": {"trust_remote_code": True}}}
        ).submit_job()
    job_id = connect().submit_job()["job_id"]
    with pytest.raises(NotFound, match=job_id):
        connect(owner="bob").get_job_status(job_id)
    with pytest.raises(NotFound):
        list(connect(owner="bob").events(job_id))
    with pytest.raises(Unauthorized, match="SPIDER_API_KEY"):
        connect(api_key="sk_nobody_x").list_jobs()


def write_tasks(folder: Path) -> None:
    """``tasks.jsonl`` with one task, and its repository beside it."""
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(folder)]
    subprocess.run([*git, "init", "--quiet", "repository"], check=True)
    git[-1] = str(folder / "repository")
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "one"], check=True)
    row = {"instance_id": "a", "repo_source": "repository"}
    (folder / "tasks.jsonl").write_text(json.dumps(row) + "\n")


def check_uploaded(fleet: Fleet, inputs: list[dict[str, str]]) -> None:
    """That the fleet has what ``write_tasks`` wrote."""
    assert inputs[0]["name"] == "tasks.jsonl"
    rows, bundle = (fleet.inputs.path(one["sha256"]) for one in inputs)
    named = f"input:{bundle.name}"
    assert json.loads(rows.read_bytes()) == {"instance_id": "a", "repo_source": named}
    heads = subprocess.run(["git", "bundle", "list-heads", bundle], check=True, capture_output=True)
    assert b"HEAD" in heads.stdout


def test_a_swe_job_takes_its_tasks_and_their_repositories_along(
    connect: Callable[..., Client], fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_KEY", "canary-key")
    write_tasks(tmp_path)
    swe = {"llm_model": "m", "llm_api_key_env": "MODEL_KEY", "dataset": "tasks.jsonl"}
    config = AppConfig.from_dict({**swe, "max_budget_total": 2.0})
    client = connect(config=config)
    job_id = client.submit_job({"num_workers": 3}, idempotency_key="k")["job_id"]
    assert client.submit_job({"num_workers": 3}, idempotency_key="k")["job_id"] == job_id
    with pytest.raises(Conflict):
        client.submit_job({"num_workers": 4}, idempotency_key="k")
    record = fleet.jobs.get(job_id)
    assert (record.queue, record.document["swe"]["num_workers"]) == (Queue.SWE_AGENT, 3)
    assert fleet.jobs.secrets(job_id) == {"MODEL_KEY": "canary-key"}
    check_uploaded(fleet, record.document["swe"]["inputs"])
    client.cancel_job(job_id)
    assert client.retry_job(job_id, max_budget_total=9)["job"]["swe"]["max_budget_total"] == 9
    assert fleet.jobs.secrets(job_id) == {"MODEL_KEY": "canary-key"}, "brought again by name"


@pytest.fixture
def commands(connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch) -> Client:
    """Commands reach the API as this client does."""
    client = connect(None)
    monkeypatch.setattr("spider_sdk.client.Client.close", lambda self: None)
    transport = client._transport
    monkeypatch.setattr("spider_sdk.client.Transport", lambda **_: transport)
    return client


def test_a_swe_file_is_submitted_with_its_tasks_and_apart_from_its_secrets(
    commands: Client,
    fleet: Fleet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_tasks(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "canary-token")
    (tmp_path / "swe.yaml").write_text(
        "dataset: ./tasks.jsonl\n"
        "llm_model: openai/m\n"
        "llm_api_key: canary-key\n"
        "hf_repo_id: me/trajectories\n"
        "num_workers: 3\n"
    )
    assert run(["submit", "swe.yaml", "--detach", "--json", "--set", "seed=7"]) == 0
    out, err = capsys.readouterr()
    job_id = json.loads(out.splitlines()[0])["job_id"]
    record = fleet.jobs.get(job_id)
    assert record.queue is Queue.SWE_AGENT
    (message,) = fleet.redis.lrange("spider:swe-agent", 0, -1)
    body = base64.b64decode(json.loads(message)["body"]).decode()
    assert job_id in body
    swe = dict(record.document["swe"])
    check_uploaded(fleet, swe.pop("inputs"))
    assert "llm_api_key" not in swe
    name = swe.pop("llm_api_key_env")
    assert swe == {
        "dataset": "tasks.jsonl", "llm_model": "openai/m", "hf_repo_id": "me/trajectories",
        "num_workers": 3, "seed": 7,
    }  # fmt: skip
    assert fleet.jobs.secrets(job_id) == {name: "canary-key", "HF_TOKEN": "canary-token"}
    shown = json.dumps(commands.get_job_status(job_id))
    for text in (out, err, shown, body, json.dumps(record.document)):
        assert "canary" not in text


def test_a_swe_file_on_the_command_line(
    commands: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = commands
    (tmp_path / "swe.yaml").write_text("llm_model: m\nmax_budget_total: 2\n")
    assert run(["validate", "swe.yaml"]) == 0
    assert capsys.readouterr().err == ""
    assert run(["submit", "swe.yaml", "--detach", "--json", "--set", "num_workers=2"]) == 0
    job_id = json.loads(capsys.readouterr().out.splitlines()[0])["job_id"]
    client.cancel_job(job_id)
    assert run(["retry", job_id, "--max-budget-total", "0"]) == 2
    assert run(["retry", job_id, "--max-budget-total", "7.5"]) == 0
    swe = client.get_job_status(job_id)["job"]["swe"]
    assert (swe["max_budget_total"], swe["num_workers"]) == (7.5, 2)
    assert run(["status", job_id]) == 0
    assert f"job {job_id} queued" in capsys.readouterr().out
