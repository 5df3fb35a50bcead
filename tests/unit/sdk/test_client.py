"""``Client`` against a real server that answers by a script."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import spider_sdk
from spider_sdk import AppConfig, Client
from spider_sdk.errors import (
    ConfigError,
    Conflict,
    NotFound,
    PollTimeout,
    ServerBusy,
    UsageError,
)
from spider_sdk.transport import RetryPolicy
from tests.support.scripted_server import (
    ScriptedServer,
    answer_bytes,
    answer_json,
    cut_before_answer,
    event,
    event_stream,
    frame,
    job_status,
    named_frame,
    problem,
    status_document,
)

JOB, EVENTS = "/v1/jobs/j1", "/v1/jobs/j1/events"
LOG = [
    event(0, "job.queued"),
    event(1, "job.running"),
    event(2, "progress", metrics={"rows_done": 2}),
    event(3, "job.completed"),
]
CONFIG = """\
server:
  base_url: {url}
  api_key: {key}
job:
  model:
    provider: openai
    name: m
    base_url: https://models.example/v1
    api_key_env: MODEL_KEY
  source:
    dataset: {dataset}
    field: question
  output:
    mode: return
    local_path: {local}
"""


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPIDER_BASE_URL", "SPIDER_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SPIDER_CONFIG", str(tmp_path / "user.toml"))
    monkeypatch.setenv("MODEL_KEY", "mk-1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RetryPolicy, "delay", lambda self, attempt, asked=None: 0.001)


@pytest.fixture
def config(tmp_path: Path, server: ScriptedServer) -> Callable[..., Path]:
    def write(**values: str) -> Path:
        filled = {"url": server.url, "key": "", "dataset": "openai/gsm8k", "local": "", **values}
        path = tmp_path / "job.yaml"
        path.write_text(CONFIG.format(**filled))
        return path

    return write


@pytest.fixture
def client(config: Callable[..., Path]) -> Iterator[Client]:
    with Client.from_config(config()) as made:
        yield made


def test_the_public_names() -> None:
    assert spider_sdk.__all__ == [
        "ApiError",
        "AppConfig",
        "Client",
        "ConfigError",
        "Conflict",
        "Event",
        "JobCancelled",
        "JobFailed",
        "JobStatus",
        "NotFound",
        "PollTimeout",
        "Problem",
        "ServerBusy",
        "ServerUnreachable",
        "SpiderClient",
        "SpiderError",
        "StatusDocument",
        "Submission",
        "Unauthorized",
        "UsageError",
    ]
    for name in spider_sdk.__all__:
        assert getattr(spider_sdk, name) is not None
    assert spider_sdk.SpiderClient is spider_sdk.Client
    with pytest.raises(AttributeError):
        _ = spider_sdk.nothing_of_the_kind


# Submitting.


def test_a_job_is_submitted_once_whatever_the_network_does(
    server: ScriptedServer, client: Client
) -> None:
    accepted = answer_json({"job_id": "j1", "status": "queued"}, 201)
    server.on("POST", "/v1/jobs", problem(503, "Redis is down"), cut_before_answer, accepted)
    assert client.submit_job() == {"job_id": "j1", "status": "queued"}
    assert client.submit_job()["job_id"] == "j1"
    keys = [seen.headers["idempotency-key"] for seen in server.seen]
    assert len(keys) == 4
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_a_key_of_ones_own(server: ScriptedServer, client: Client) -> None:
    server.on("POST", "/v1/jobs", problem(422, "this key was used for job j1 with another body"))
    with pytest.raises(Conflict, match="another body"):
        client.submit_job(idempotency_key="mine")
    for key in ("clé", "a\nb", "x" * 256):
        with pytest.raises(UsageError, match="idempotency key"):
            client.submit_job(idempotency_key=key)
    assert len(server.seen) == 1
    assert server.seen[0].headers["idempotency-key"] == "mine"


def test_a_busy_server_is_told_in_the_end(server: ScriptedServer, client: Client) -> None:
    server.on("POST", "/v1/jobs", problem(503, "Redis is full"))
    with pytest.raises(ServerBusy, match="Redis is full"):
        client.submit_job()


def test_secrets_travel_beside_the_job(
    server: ScriptedServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.on("POST", "/v1/jobs", answer_json({"job_id": "j1", "status": "queued"}))
    client.submit_job()
    body = server.seen[0].json
    assert body["env"] == {"MODEL_KEY": "mk-1"}
    assert "mk-1" not in json.dumps(body["job"])
    assert body["job"]["model"]["api_key_env"] == "MODEL_KEY"
    assert client.forwarded == ("MODEL_KEY",)


def test_what_would_go_is_known_before(client: Client) -> None:
    assert client.forwarded == ("MODEL_KEY",)
    with Client() as other:
        assert other.forwarded == ()


def test_others_are_forwarded_by_name_or_value(
    server: ScriptedServer, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.on("POST", "/v1/jobs", answer_json({"job_id": "j1", "status": "queued"}))
    monkeypatch.setenv("HF_TOKEN", "hf-1")
    for env in (("HF_TOKEN",), "HF_TOKEN", {"HF_TOKEN": "hf-1"}):
        with Client(config(), env=env) as client:
            client.submit_job()
    assert [seen.json["env"] for seen in server.seen] == [
        {"MODEL_KEY": "mk-1", "HF_TOKEN": "hf-1"}
    ] * 3


def test_a_missing_secret_is_named_before_anything_is_sent(
    server: ScriptedServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODEL_KEY")
    with pytest.raises(ConfigError, match="MODEL_KEY"):
        client.submit_job()
    assert server.seen == []


def test_so_is_a_name_that_was_asked_for(
    config: Callable[..., Path], server: ScriptedServer
) -> None:
    with (
        Client(config(), env=("NOT_SET_HERE",)) as client,
        pytest.raises((ConfigError, UsageError), match="NOT_SET_HERE"),
    ):
        client.submit_job()
    assert server.seen == []


def test_a_name_that_a_job_may_not_set(config: Callable[..., Path]) -> None:
    with (
        Client(config(), env={"LD_PRELOAD": "x"}) as client,
        pytest.raises(ConfigError, match="LD_PRELOAD"),
    ):
        client.submit_job()


def test_an_inline_key_is_lifted_out(
    server: ScriptedServer, config: Callable[..., Path], tmp_path: Path
) -> None:
    server.on("POST", "/v1/jobs", answer_json({"job_id": "j1", "status": "queued"}))
    path = config()
    path.write_text(path.read_text().replace("api_key_env: MODEL_KEY", "api_key: inline-1"))
    with Client(path) as client:
        client.submit_job()
        body = server.seen[0].json
        assert "inline-1" not in json.dumps(body["job"])
        (name,) = client.forwarded
        assert body["env"] == {name: "inline-1"}
        assert body["job"]["model"]["api_key_env"] == name


def test_overrides_are_merged_and_checked(server: ScriptedServer, client: Client) -> None:
    server.on("POST", "/v1/jobs", answer_json({"job_id": "j1", "status": "queued"}))
    client.submit_job({"generation": {"parameters": {"temperature": 0.2}}})
    client.submit_job()
    changed, plain = (seen.json["job"] for seen in server.seen)
    assert changed["generation"]["parameters"] == {"temperature": 0.2}
    assert changed["source"]["dataset"] == "openai/gsm8k"
    assert "temperature" not in json.dumps(plain)
    with pytest.raises(ConfigError, match="generatoin"):
        client.submit_job({"generatoin": {}})
    assert len(server.seen) == 2


def test_local_data_goes_first(
    server: ScriptedServer, config: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?"}\n')
    server.on("POST", "/v1/jobs", answer_json({"job_id": "j1", "status": "queued"}))
    with Client(config(dataset="rows.jsonl")) as client:
        (tmp_path / "rows.jsonl").write_text('{"question": "2+2?"}\n')
        uploads: list[str] = []

        def accept(handler: Any) -> None:
            uploads.append(handler.path)
            answer_json({}, 201)(handler)

        digest = hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()
        server.on("PUT", f"/v1/inputs/{digest}", accept)
        client.submit_job()
    assert [seen.method for seen in server.seen] == ["HEAD", "PUT", "POST"]
    source = server.seen[-1].json["job"]["source"]
    assert source["inputs"] == [{"name": "rows.jsonl", "sha256": digest}]


def test_what_files_cannot_have_is_said_before_they_are_sent(
    server: ScriptedServer, config: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?"}\n')
    said = pytest.raises(ConfigError, match=r"source\.revision.*uploaded files")
    with Client(config(dataset="rows.jsonl")) as client, said:
        client.submit_job({"source": {"revision": "main"}})
    assert server.seen == []


def doubled(row: dict[str, Any], factor: int = 2) -> str:
    return row["question"] * factor


def test_processors_travel_as_source(server: ScriptedServer, config: Callable[..., Path]) -> None:
    server.on("POST", "/v1/jobs", answer_json({"job_id": "j1", "status": "queued"}))
    with Client(config(), pre_processor=doubled, pre_processor_kwargs={"factor": 3}) as client:
        client.submit_job()
    sent = server.seen[0].json["job"]["pre_processor"]
    assert sent["name"] == "doubled"
    assert sent["kwargs"] == {"factor": 3}
    assert "def doubled" in sent["source"]
    assert "post_processor" not in server.seen[0].json["job"]


def test_kwargs_without_a_processor_are_refused(config: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="pre_processor"):
        Client(config(), pre_processor_kwargs={"factor": 3})


def test_an_evaluator_travels_with_a_training_job(
    server: ScriptedServer, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tk")
    server.on("POST", "/v1/jobs", answer_json({"job_id": "j1", "status": "queued"}))
    training = {"on_policy": True, "on_policy_options": {"teacher": "t"}}
    with Client(config(), base_url=server.url, evaluator=doubled) as client:
        client.submit_job(
            {
                "model": {"provider": "tinker", "api_key_env": "TINKER_API_KEY"},
                "generation": training,
            }
        )
    sent = server.seen[0].json
    assert sent["job"]["evaluator"]["name"] == "doubled"
    assert sent["env"]["TINKER_API_KEY"] == "tk"


def test_an_evaluator_of_an_off_policy_job_is_refused(
    server: ScriptedServer, config: Callable[..., Path]
) -> None:
    with (
        Client(config(), base_url=server.url, evaluator=doubled) as client,
        pytest.raises(ConfigError, match="post_processor"),
    ):
        client.submit_job()
    assert server.seen == []


def test_a_client_without_a_config_submits_nothing(server: ScriptedServer) -> None:
    with Client(base_url=server.url) as client, pytest.raises(UsageError, match="no config"):
        client.submit_job()


# Where the server is.


def test_precedence(
    tmp_path: Path, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def address(**options: Any) -> str:
        with Client(**options) as client:
            return client.base_url

    assert address() == "http://127.0.0.1:9000"
    (tmp_path / "user.toml").write_text('base_url = "http://user:1"\n')
    assert address() == "http://user:1"
    monkeypatch.setenv("SPIDER_BASE_URL", "http://env:1")
    assert address() == "http://env:1"
    assert address(config=config(url="")) == "http://env:1"
    assert address(config=config(url="http://yaml:1")) == "http://yaml:1"
    assert address(config=config(url="http://yaml:1"), base_url="http://arg:1") == "http://arg:1"


def test_precedence_of_the_key(
    server: ScriptedServer, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.on("GET", "/v1/jobs", answer_json({"jobs": []}))
    monkeypatch.setenv("SPIDER_API_KEY", "sk-env")
    for options in (
        {"config": AppConfig.load(config())},
        {"config": AppConfig.load(config(key="sk-yaml"))},
        {"config": AppConfig.load(config(key="sk-yaml")), "api_key": "sk-arg"},
    ):
        with Client(**options) as client:  # type: ignore[arg-type]
            client.list_jobs()
    sent = [seen.headers["authorization"] for seen in server.seen]
    assert sent == ["Bearer sk-env", "Bearer sk-yaml", "Bearer sk-arg"]


def test_the_server_section_is_used(server: ScriptedServer, config: Callable[..., Path]) -> None:
    path = config()
    extra = "  request_timeout: 0.1\n  verify_tls: false\n  headers: {X-Team: red}\n"
    path.write_text(path.read_text().replace("server:\n", "server:\n" + extra))
    server.on("GET", "/v1/jobs", answer_json({"jobs": []}))
    server.on("GET", JOB, lambda handler: server.released.wait() and None)
    with Client(path) as client:
        client.list_jobs()
        assert server.seen[0].headers["x-team"] == "red"
        with pytest.raises(spider_sdk.ServerUnreachable, match="request_timeout"):
            client.get_job_status("j1")


def test_verify_tls_reaches_the_connection(
    config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    real = httpx2.Client

    def spy(**options: Any) -> httpx2.Client:
        given.append(options["verify"])
        return real(**options)

    monkeypatch.setattr("spider_sdk.transport.httpx2.Client", spy)
    path = config()
    Client(path).close()
    path.write_text(path.read_text().replace("server:\n", "server:\n  verify_tls: false\n"))
    Client(path).close()
    assert given == [True, False]


def test_a_wsgi_application_stands_in_for_the_network() -> None:
    def app(environ: dict[str, Any], start: Callable[..., Any]) -> list[bytes]:
        start("200 OK", [("Content-Type", "application/json")])
        return [json.dumps({"jobs": [status_document("queued")]}).encode()]

    with Client(transport=httpx2.WSGITransport(app=app)) as client:
        assert client.list_jobs()[0]["job_id"] == "j1"


# Following.


def test_poll_job_streams(server: ScriptedServer, client: Client) -> None:
    server.on("GET", JOB, job_status("queued", LOG[:1]))
    end = named_frame("end", status_document("completed", LOG))
    server.on("GET", EVENTS, event_stream([*[frame(entry) for entry in LOG[:3]], end]))
    seen: list[Any] = []
    final = client.poll_job("j1", on_update=seen.append)
    assert final["status"] == "completed"
    codes = [entry["code"] for document in seen for entry in document["events"]]
    assert codes == [entry["code"] for entry in LOG]
    assert [document["status"] for document in seen][:3] == ["queued", "running", "running"]
    assert seen[2]["metrics"] == {"rows_done": 2}


def test_poll_job_without_streaming(server: ScriptedServer, client: Client) -> None:
    server.on("GET", JOB, job_status("queued", LOG[:1]), job_status("completed", LOG))
    seen: list[Any] = []
    final = client.poll_job("j1", interval=0.01, stream_events=False, on_update=seen.append)
    assert final["status"] == "completed"
    codes = [entry["code"] for document in seen for entry in document["events"]]
    assert codes == [entry["code"] for entry in LOG]
    assert server.requests("GET", EVENTS) == []


def test_poll_job_that_does_not_wait(server: ScriptedServer, client: Client) -> None:
    server.on("GET", JOB, job_status("running", LOG[:2]))
    assert client.poll_job("j1", wait_for_completion=False)["status"] == "running"
    assert len(server.seen) == 1


def test_poll_job_out_of_time(server: ScriptedServer, client: Client) -> None:
    server.on("GET", JOB, job_status("running", LOG[:2]))
    server.on("GET", EVENTS, event_stream([], then="hold"))
    with pytest.raises(PollTimeout):
        client.poll_job("j1", timeout=0.1)


def test_a_failed_job_is_a_status_not_an_exception(server: ScriptedServer, client: Client) -> None:
    log = [event(0, "job.queued"), event(1, "job.failed", error="no good row")]
    server.on("GET", JOB, job_status("failed", log, error="no good row"))
    server.on("GET", EVENTS, event_stream([]))
    final = client.poll_job("j1")
    assert (final["status"], final["error"]) == ("failed", "no good row")


def test_events(server: ScriptedServer, client: Client) -> None:
    server.on("GET", JOB, job_status("completed", LOG))
    server.on("GET", EVENTS, event_stream([frame(entry) for entry in LOG[1:]], then="hold"))
    assert [event.offset for event in client.events("j1", since=1)] == [1, 2, 3]


# The rest.


def test_lists_are_paged(server: ScriptedServer, client: Client) -> None:
    one = answer_json({"jobs": [{"job_id": "a"}, {"job_id": "b"}], "next_cursor": "t"})
    server.on("GET", "/v1/jobs", one, answer_json({"jobs": [{"job_id": "c"}], "next_cursor": None}))
    jobs = client.list_jobs(status="queued", limit=None)
    assert [job["job_id"] for job in jobs] == ["a", "b", "c"]
    queries = [seen.query for seen in server.seen]
    assert queries == ["limit=200&status=queued", "limit=200&status=queued&cursor=t"]
    with pytest.raises(UsageError, match="queued"):
        client.list_jobs(status="done")


def test_cancel(server: ScriptedServer, client: Client) -> None:
    answer = answer_json(status_document("cancelled"))
    server.on("POST", "/v1/jobs/j1/cancel", cut_before_answer, answer)
    assert client.cancel_job("j1")["status"] == "cancelled"


def test_retry_forwards_what_the_job_needs(
    server: ScriptedServer, config: Callable[..., Path]
) -> None:
    document = {
        "model": {
            "provider": "openai",
            "name": "m",
            "base_url": "https://models.example/v1",
            "api_key_env": "MODEL_KEY",
        },
        "source": {"dataset": "openai/gsm8k", "field": "question"},
    }
    server.on("GET", JOB, job_status("failed", LOG, job=document))
    server.on("POST", "/v1/jobs/j1/retry", answer_json(status_document("queued")))
    with Client(base_url=server.url) as client:
        assert client.retry_job("j1")["status"] == "queued"
        assert client.forwarded == ("MODEL_KEY",)
        client.retry_job("j1", env={"MODEL_KEY": "other"})
    posts = server.requests("POST", "/v1/jobs/j1/retry")
    assert [seen.json for seen in posts] == [
        {"env": {"MODEL_KEY": "mk-1"}},
        {"env": {"MODEL_KEY": "other"}},
    ]


def test_logs_and_artifacts(server: ScriptedServer, client: Client) -> None:
    server.on("GET", "/v1/jobs/j1/logs", answer_bytes("zeile é\n".encode(), kind="text/plain"))
    listed = [{"name": "a.jsonl", "size": 3}]
    server.on("GET", "/v1/jobs/j1/artifacts", answer_json({"artifacts": listed}))
    assert client.logs("j1") == "zeile é\n"
    assert client.artifacts("j1") == listed


def test_download_and_the_configs_local_path(
    server: ScriptedServer, config: Callable[..., Path], tmp_path: Path
) -> None:
    server.on("GET", "/v1/jobs/j1/result", answer_bytes(b"{}"))
    with Client(config(local="out/rows.parquet")) as client:
        assert client.download_result("j1", destination=tmp_path / "result.json").name
        assert client.save_local("j1") == Path("out/rows.parquet")
        assert client.download_result("j1") == Path("out/rows.parquet")
        with pytest.raises(UsageError, match="destination"):
            client.download_result("j1", format="json")
    assert (tmp_path / "result.json").read_bytes() == b"{}"
    assert (tmp_path / "out/rows.parquet").read_bytes() == b"{}"
    assert [seen.query for seen in server.seen] == ["", *["format=parquet"] * 2]
    with Client(config()) as client:
        assert client.save_local("j1") is None
        with pytest.raises(UsageError, match=r"output\.local_path"):
            client.download_result("j1")


def test_artifacts_of_a_training_run_come_without_its_state(
    tmp_path: Path, server: ScriptedServer, client: Client
) -> None:
    names = ["shards/train.jsonl", "adapter/a.bin", "curves.png", "state/step-000002/m.bin"]
    listed = [{"name": name} for name in names]
    server.on("GET", "/v1/jobs/j1/artifacts", answer_json({"artifacts": listed}))
    for name in ("adapter/a.bin", "curves.png"):
        server.on("GET", f"/v1/jobs/j1/artifacts/{name}", answer_bytes(name.encode()))
    paths = client.download_artifacts("j1", tmp_path / "out")
    assert [path.read_text() for path in paths] == ["adapter/a.bin", "curves.png"]
    assert client.download_artifacts("j1", tmp_path, "cur") == [tmp_path / "curves.png"]
    with pytest.raises(NotFound, match="'none'"):
        client.download_artifacts("j1", tmp_path, "none")


def test_the_state_of_a_run_comes_when_it_is_asked_for(
    tmp_path: Path, server: ScriptedServer, client: Client
) -> None:
    listed = [{"name": name} for name in ("stage.txt", "state/step-000002/a.bin")]
    server.on("GET", "/v1/jobs/j1/artifacts", answer_json({"artifacts": listed}))
    for one in listed:
        server.on("GET", f"/v1/jobs/j1/artifacts/{one['name']}", answer_bytes(b""))
    state = [tmp_path / "state/step-000002/a.bin"]
    assert client.download_artifacts("j1", tmp_path, "state") == state
    assert client.download_artifacts("j1", tmp_path, "state/step-000002") == state
    assert client.download_artifacts("j1", tmp_path, "sta") == [tmp_path / "stage.txt"]
