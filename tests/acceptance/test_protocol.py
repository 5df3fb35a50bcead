"""The HTTP protocol as a client in any language speaks it: plain JSON over a socket, to the real
API, a real worker and a scripted endpoint. Nothing of the SDK is used."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from spider_worker.fleet.keys import ApiKeys
from tests.support.api_server import ApiServer
from tests.support.fleet_harness import Harness, start
from tests.support.openai_server import Script, ScriptedServer, running_server

TERMINAL = ("completed", "failed", "cancelled")
SECONDS = 60

PRE = """
def ask(row, prefix):
    if row["n"] == 1:
        return None
    return prefix + row["q"]
"""
POST = """
def keep(record):
    if record["index"] == 2:
        return None
    if record["index"] == 3:
        raise ValueError("no three")
    return {**record, "length": len(record["completion"])}
"""


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    folder = tmp_path_factory.mktemp("fleet")
    home = str(folder / "hf")
    for harness in start(folder, SPIDER_SANDBOX="process", HF_HOME=home):
        harness.worker()
        yield harness


@pytest.fixture(scope="module")
def http(harness: Harness) -> Iterator[httpx2.Client]:
    fleet = harness.fleet
    _, token = ApiKeys(fleet.redis, fleet.secret_box).create("someone")
    server = ApiServer(fleet.settings, harness.folder, ALLOW_PRIVATE_URLS="true", REAPER="false")
    headers = {"Authorization": f"Bearer {token}"}
    with server, httpx2.Client(base_url=server.base_url, headers=headers, timeout=SECONDS) as http:
        yield http


@pytest.fixture
def endpoint() -> Iterator[ScriptedServer]:
    with running_server() as server:
        yield server


def put_rows(http: httpx2.Client, questions: list[str]) -> dict[str, Any]:
    """Upload rows; what a job says to use them."""
    lines = [json.dumps({"q": question, "n": n}) + "\n" for n, question in enumerate(questions)]
    data = "".join(lines).encode()
    digest = hashlib.sha256(data).hexdigest()
    answer = http.put(f"/v1/inputs/{digest}", content=data)
    assert answer.status_code in (200, 201), answer.text
    assert answer.json() == {"sha256": digest, "size": len(data)}
    inputs = [{"name": "rows.jsonl", "sha256": digest}]
    return {"dataset": "rows.jsonl", "split": "train", "field": "q", "inputs": inputs}


def job_of(endpoint: ScriptedServer, source: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {
        "model": {
            "provider": "openai",
            "name": "m",
            "base_url": endpoint.base_url,
            "parameters": {"max_retries": 1, "patience": 0.5},
        },
        "source": source,
        "generation": {"parameters": {"temperature": 0.7, "max_tokens": 16}},
        "output": {"mode": "return"},
        **sections,
    }


def submit(http: httpx2.Client, job: dict[str, Any], **headers: str) -> str:
    answer = http.post("/v1/jobs", json={"job": job}, headers=headers)
    assert answer.status_code in (200, 201), answer.text
    assert answer.json().keys() == {"job_id", "status"}
    return str(answer.json()["job_id"])


def wait(http: httpx2.Client, job_id: str) -> dict[str, Any]:
    """Poll with ``since``, as the simplest client does: every event comes once."""
    deadline, since, codes = time.monotonic() + SECONDS, 0, []
    while time.monotonic() < deadline:
        document: dict[str, Any] = http.get(f"/v1/jobs/{job_id}", params={"since": since}).json()
        offsets = [event["offset"] for event in document["events"]]
        assert offsets == list(range(since, since + len(offsets)))
        codes += [event["code"] for event in document["events"]]
        since = document["events_next_offset"]
        if document["status"] in TERMINAL:
            return {**document, "codes": codes}
        time.sleep(0.05)
    raise AssertionError(f"{job_id} did not end: {codes}")


def records(http: httpx2.Client, job_id: str) -> list[dict[str, Any]]:
    answer = http.get(f"/v1/jobs/{job_id}/result", params={"format": "jsonl"})
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def test_a_job_from_data_to_result(http: httpx2.Client, endpoint: ScriptedServer) -> None:
    questions = [f"number {n}" for n in range(40)]
    bad = (10, 20, 30)
    for n in bad:
        questions[n] += " [[500]]"
    source = put_rows(http, questions)
    processors = {
        "pre_processor": {"name": "ask", "source": PRE, "kwargs": {"prefix": "Q: "}},
        "post_processor": {"name": "keep", "source": POST, "kwargs": {}},
    }
    job_id = submit(http, job_of(endpoint, source, **processors))
    document = wait(http, job_id)

    # Three rows that always fail, and one whose processor raises, cost four error rows.
    assert (document["status"], document["error"]) == ("completed", None)
    assert document["codes"][0] == "job.queued"
    assert document["codes"][-1] == "job.completed"
    counts = {"rows_total": 40, "rows_done": 40, "rows_ok": 34, "rows_error": 4, "rows_dropped": 2}
    assert counts.items() <= document["metrics"].items()
    assert document["metrics"]["completion_tokens"] > 0
    assert document["metrics"]["cost_usd"] is None

    found = {record["index"]: record for record in records(http, job_id)}
    assert sorted(set(range(40)) - set(found)) == [1, 2]
    assert found[0]["prompt"] == "Q: number 0"
    assert found[0]["completion"] == "echo: Q: number 0"
    assert found[0]["length"] == len(found[0]["completion"])
    assert (found[0]["id"], found[0]["sample"], found[0]["n"]) == ("0-0", 0, 0)
    assert found[0]["finish_reason"] == "stop"
    assert found[0]["usage"].keys() == {"prompt_tokens", "completion_tokens"}
    for n in bad:
        assert found[n]["completion"] is None
        assert found[n]["error"]["stage"] == "generation"
        assert "500" in found[n]["error"]["message"]
    assert found[3]["error"]["stage"] == "post_processor"
    assert "no three" in found[3]["error"]["traceback"]

    whole = http.get(f"/v1/jobs/{job_id}/result").json()
    assert whole["job_id"] == job_id
    assert whole["artifact"] == records(http, job_id)
    again = http.post(f"/v1/jobs/{job_id}/cancel").json()
    assert again["status"] == "completed"


def test_files_come_in_ranges(http: httpx2.Client, endpoint: ScriptedServer) -> None:
    job_id = submit(http, job_of(endpoint, put_rows(http, ["one", "two"])))
    wait(http, job_id)
    listed = http.get(f"/v1/jobs/{job_id}/artifacts").json()["artifacts"]
    path, size = listed[0]["path"], listed[0]["size"]
    whole = http.get(path).content
    assert len(whole) == size
    assert http.head(path).headers["Content-Length"] == str(size)
    part = http.get(path, headers={"Range": f"bytes={size // 2}-"})
    assert (part.status_code, part.content) == (206, whole[size // 2 :])


def test_a_stream_that_breaks_goes_on_after_its_last_event(
    http: httpx2.Client, endpoint: ScriptedServer
) -> None:
    """A new connection after each event: each comes once, in order, up to the end."""
    job_id = submit(http, job_of(endpoint, put_rows(http, ["one", "two"]), shard_size=1))
    codes: list[str] = []
    last: str | None = None
    ended = False
    while not ended:
        headers = {"Last-Event-ID": last} if last else {}
        with http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            for name, identity, data in messages(response):
                last = identity
                if name == "end":
                    assert data["status"] == "completed"
                    ended = True
                else:
                    assert data["offset"] == len(codes)
                    codes.append(data["code"])
                break
    assert codes[0] == "job.queued"
    assert codes[-1] == "job.completed"
    events = http.get(f"/v1/jobs/{job_id}").json()["events"]
    assert codes == [event["code"] for event in events]


def messages(response: httpx2.Response) -> Iterator[tuple[str, str | None, Any]]:
    """(event, id, JSON) of each server-sent message."""
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        name, _, value = line.partition(":")
        if line and name:
            fields[name] = value.strip()
        elif not line:
            if "data" in fields:
                yield (
                    fields.get("event", "message"),
                    fields.get("id"),
                    json.loads(fields["data"]),
                )
            fields = {}


def test_results_before_the_end_and_a_cancel(http: httpx2.Client, endpoint: ScriptedServer) -> None:
    questions = [f"number {n}" for n in range(8)] + ["stuck [[hang]]"]
    job = job_of(endpoint, put_rows(http, questions))
    job["model"]["parameters"] = {"timeout": 600}
    job_id = submit(http, job)
    deadline = time.monotonic() + SECONDS
    while (answer := http.get(f"/v1/jobs/{job_id}/result")).status_code == 404:
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert time.monotonic() < deadline, "there never was a result"
        time.sleep(0.05)
    assert answer.json()["status"] == "running"
    assert 0 < len(answer.json()["artifact"]) <= 8
    http.post(f"/v1/jobs/{job_id}/cancel")
    assert wait(http, job_id)["status"] == "cancelled"
    assert sorted(record["index"] for record in records(http, job_id)) == list(range(8))


def test_no_good_row_fails_the_job_and_a_retry_runs_what_failed(
    http: httpx2.Client, endpoint: ScriptedServer
) -> None:
    questions = [f"later {n} [[503:2]]" for n in range(3)]
    job_id = submit(http, job_of(endpoint, put_rows(http, questions)))
    document = wait(http, job_id)
    assert document["status"] == "failed"
    assert "no good row" in document["error"]
    assert document["metrics"]["rows_error"] == 3
    assert [record["error"]["type"] for record in records(http, job_id)] == ["http_503"] * 3

    answer = http.post(f"/v1/jobs/{job_id}/retry", json={"env": {}})
    assert (answer.status_code, answer.json()["status"]) == (200, "queued")
    document = wait(http, job_id)
    assert (document["status"], document["error"]) == ("completed", None)
    assert document["metrics"]["rows_ok"] == 3
    assert [record["error"] for record in records(http, job_id)] == [None] * 3


def test_a_retry_repeats_no_good_row(http: httpx2.Client, endpoint: ScriptedServer) -> None:
    questions = ["good one", "good two", "later [[503:2]]"]
    job_id = submit(http, job_of(endpoint, put_rows(http, questions)))
    assert wait(http, job_id)["metrics"]["rows_error"] == 1
    before = Counter(endpoint.counts.prompts)
    http.post(f"/v1/jobs/{job_id}/retry", json={"env": {}})
    assert wait(http, job_id)["metrics"]["rows_ok"] == 3
    assert Counter(endpoint.counts.prompts) - before == {questions[2]: 1}
    again = http.post(f"/v1/jobs/{job_id}/retry")
    assert again.status_code == 409


def test_a_refused_key_fails_the_job_at_once(http: httpx2.Client) -> None:
    with running_server(Script(api_key="the right one")) as endpoint:
        job = job_of(endpoint, put_rows(http, [f"number {n}" for n in range(50)]))
        job["model"]["api_key"] = "sk-the-wrong-one"
        job_id = submit(http, job)
        document = wait(http, job_id)
    assert document["status"] == "failed"
    assert "401" in document["error"]
    text = json.dumps(document) + http.get(f"/v1/jobs/{job_id}/logs").text
    assert "sk-the-wrong-one" not in text
    assert "api_key" not in document["job"]["model"]


def test_what_is_wrong_is_told_all_at_once(http: httpx2.Client, endpoint: ScriptedServer) -> None:
    job = job_of(endpoint, {"dataset": "org/data", "feild": "q", "max_examples": "many"})
    job["generation"]["temperature"] = 0.7
    answer = http.post("/v1/jobs", json={"job": {**job, "tols": []}})
    assert answer.status_code == 422
    assert answer.headers["Content-Type"] == "application/problem+json"
    found = {error["path"]: error["message"] for error in answer.json()["errors"]}
    assert found.keys() >= {
        "job.source.feild",
        "job.source.max_examples",
        "job.generation.temperature",
        "job.tols",
    }
    assert "did you mean field" in found["job.source.feild"]
    assert "generation.parameters" in found["job.generation.temperature"]


def test_a_key_makes_one_job(http: httpx2.Client, endpoint: ScriptedServer, tmp_path: Path) -> None:
    job = job_of(endpoint, put_rows(http, ["one"]))
    key = {"Idempotency-Key": tmp_path.name}
    job_id = submit(http, job, **key)
    wait(http, job_id)
    again = http.post("/v1/jobs", json={"job": job}, headers=key)
    assert again.json() == {"job_id": job_id, "status": "queued"}
    other = http.post("/v1/jobs", json={"job": {**job, "shard_size": 9}}, headers=key)
    assert other.status_code == 422
