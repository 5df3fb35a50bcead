"""Submitting, reading, listing, cancelling and retrying over the app and a real Redis."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask

from spider_sdk.jobs import Queue
from spider_worker.fleet import Fleet
from tests.support.hand_run import HandRun, record

# tests/ is no package (importlib mode): the conftest's words come through fixtures.
JOB: dict[str, Any] = {
    "model": {"provider": "openai", "name": "m", "base_url": "https://models.example/v1"},
    "source": {"dataset": "org/data", "field": "question"},
}
FIELDS = {
    "job_id", "status", "submitted_at", "updated_at", "messages", "error", "artifacts_path",
    "remote_artifact", "metrics", "job", "events", "events_next_offset", "events_start_offset",
    "events_truncated",
}  # fmt: skip


def test_a_submitted_job_can_be_read(ada: Any) -> None:
    answer = ada.post("/v1/jobs", {"job": JOB})
    assert answer.status_code == 201
    assert answer.json.keys() == {"job_id", "status"}
    assert answer.json["status"] == "queued"
    document = ada.get(f"/v1/jobs/{answer.json['job_id']}").json
    assert document.keys() == FIELDS
    assert document["job"] == JOB
    assert document["artifacts_path"] == f"/v1/jobs/{answer.json['job_id']}/artifacts"
    assert [event["code"] for event in document["events"]] == ["job.queued"]
    assert document["events"][0].keys() == {
        "offset", "timestamp", "level", "code", "message", "data",
    }  # fmt: skip
    assert document["metrics"]["cost_usd"] is None


def test_events_are_read_from_an_offset(ada: Any, fleet: Fleet) -> None:
    job = ada.submit()
    for number in range(3):
        fleet.events.append(job, "info", "note", str(number))
    document = ada.get(f"/v1/jobs/{job}?since=2").json
    assert [event["message"] for event in document["events"]] == ["1", "2"]
    assert document["events_next_offset"] == 4
    assert not document["events_truncated"]
    assert ada.get(f"/v1/jobs/{job}?since=4").json["events"] == []


def test_an_idempotency_key_makes_one_job(ada: Any, bob: Any) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = ada.post("/v1/jobs", {"job": JOB, "env": {"HF_TOKEN": "a"}}, headers=headers)
    again = ada.post("/v1/jobs", {"job": JOB, "env": {"HF_TOKEN": "b"}}, headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json["job_id"] == again.json["job_id"]
    other = ada.post("/v1/jobs", {"job": {**JOB, "metadata": {"x": 1}}}, headers=headers)
    assert other.status_code == 422
    assert first.json["job_id"] in other.json["detail"]
    assert bob.post("/v1/jobs", {"job": JOB}, headers=headers).json != first.json


def test_a_repeated_submit_gets_the_first_answer(ada: Any) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = ada.post("/v1/jobs", {"job": JOB}, headers=headers)
    ada.post(f"/v1/jobs/{first.json['job_id']}/cancel")
    assert ada.post("/v1/jobs", {"job": JOB}, headers=headers).json == first.json


def test_a_hundred_submits_with_one_key_are_one_job(ada: Any, fleet: Fleet) -> None:
    def submit(_: int) -> str:
        answer = ada.post("/v1/jobs", {"job": JOB}, headers={"Idempotency-Key": "same"})
        return str(answer.json["job_id"])

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(submit, range(100)))) == 1
    assert len(fleet.jobs.list("ada")[0]) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\u00e9"])
def test_a_bad_idempotency_key_is_refused(ada: Any, key: str) -> None:
    answer = ada.post("/v1/jobs", {"job": JOB}, headers={"Idempotency-Key": key})
    assert answer.status_code == 422
    assert answer.json["errors"][0]["path"] == "headers.Idempotency-Key"


def test_every_problem_of_a_job_is_told_at_once_by_path(ada: Any) -> None:
    job = {
        "model": {
            "provider": "vllm",
            "name": "/etc/model",
            "parameters": {"trust_remote_code": True},
        },
        "source": {"dataset": "org/data", "feild": "question"},
        "generation": {"duplications": "two"},
    }
    answer = ada.post("/v1/jobs", {"job": job, "env": {"LD_PRELOAD": "x", "PATH": "y"}})
    assert answer.status_code == 422
    assert answer.content_type == "application/problem+json"
    found = {error["path"]: error["message"] for error in answer.json["errors"]}
    assert {
        "job.model.name",
        "job.model.parameters.trust_remote_code",
        "job.source.feild",
        "job.generation.duplications",
        "env.LD_PRELOAD",
        "env.PATH",
    } <= found.keys()
    assert "field" in found["job.source.feild"]


def test_an_unknown_name_beside_the_job_hides_no_problem_in_it(ada: Any) -> None:
    body = {"job": {**JOB, "source": {"dataset": "a/b", "feild": "q"}}, "enw": {}}
    answer = ada.post("/v1/jobs", body)
    assert answer.status_code == 422
    paths = [error["path"] for error in answer.json["errors"]]
    assert sorted(paths) == ["enw", "job.source.feild"]


def test_a_secret_out_of_place_hides_no_other_problem(ada: Any) -> None:
    job = {**JOB, "metadata": {"api_key": "sk-canary"}, "source": {"dataset": "a/b", "feild": "q"}}
    answer = ada.post("/v1/jobs", {"job": job, "env": {"PATH": "/"}})
    assert answer.status_code == 422
    paths = [error["path"] for error in answer.json["errors"]]
    assert sorted(paths) == ["env.PATH", "job.metadata.api_key", "job.source.feild"]
    assert "sk-canary" not in answer.text


def test_a_training_job_goes_to_its_queue(ada: Any, fleet: Fleet) -> None:
    job = {
        "model": {"provider": "tinker", "name": "Qwen/Qwen3-8B"},
        "source": {"dataset": "org/data", "field": "question"},
        "generation": {"on_policy": True, "on_policy_options": {"teacher": "Qwen/Qwen3-30B-A3B"}},
    }
    answer = ada.post("/v1/jobs", {"job": job, "env": {"TINKER_API_KEY": "k"}})
    assert answer.status_code == 201
    assert fleet.jobs.get(answer.json["job_id"]).queue is Queue.ONPOLICY_TRAIN


def test_secrets_are_stripped_from_the_record(ada: Any, fleet: Fleet) -> None:
    canary = "sk-canary-0123456789abcdef"
    model = {**JOB["model"], "api_key": canary}
    job = ada.submit(env={"HF_TOKEN": "hf_canary"}, model=model)
    for path in (f"/v1/jobs/{job}", "/v1/jobs", f"/v1/jobs/{job}/artifacts"):
        text = ada.get(path).text
        assert canary not in text
        assert "hf_canary" not in text
    kept = fleet.jobs.secrets(job)
    assert kept["HF_TOKEN"] == "hf_canary"
    assert canary in kept.values()
    assert canary not in json.dumps(fleet.jobs.get(job).document)


def test_inputs_that_a_job_names_must_be_there(ada: Any, fleet: Fleet) -> None:
    inputs = [{"name": "rows.jsonl", "sha256": "a" * 64}]
    source = {"dataset": "rows.jsonl", "field": "q", "inputs": inputs}
    answer = ada.post("/v1/jobs", {"job": {**JOB, "source": source}})
    assert answer.status_code == 422
    (error,) = answer.json["errors"]
    assert error["path"] == "job.source.inputs.0"
    assert "rows.jsonl was not uploaded" in error["message"]


def test_jobs_are_listed_by_page_and_status(ada: Any, bob: Any) -> None:
    jobs = [ada.submit() for _ in range(5)]
    bob.submit()
    ada.post(f"/v1/jobs/{jobs[1]}/cancel")
    seen, cursor = [], ""
    while cursor is not None:
        page = ada.get("/v1/jobs?limit=2" + (f"&cursor={cursor}" if cursor else "")).json
        assert len(page["jobs"]) <= 2
        seen += [job["job_id"] for job in page["jobs"]]
        cursor = page["next_cursor"]
    assert sorted(seen) == sorted(jobs)
    cancelled = ada.get("/v1/jobs?status=cancelled").json["jobs"]
    assert [job["job_id"] for job in cancelled] == [jobs[1]]
    assert cancelled[0].keys() == FIELDS


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "status=done", "cursor=x", "limt=1"])
def test_a_bad_query_is_refused_by_name(ada: Any, query: str) -> None:
    answer = ada.get(f"/v1/jobs?{query}")
    assert answer.status_code == 422
    assert answer.json["errors"][0]["path"] == f"query.{query.partition('=')[0]}"


def test_cancel_is_idempotent(ada: Any) -> None:
    job = ada.submit()
    for _ in range(2):
        answer = ada.post(f"/v1/jobs/{job}/cancel")
        assert answer.status_code == 200
        assert answer.json["status"] == "cancelled"


def test_retry_takes_secrets_anew(ada: Any, fleet: Fleet) -> None:
    job = ada.submit(env={"HF_TOKEN": "old"})
    early = ada.post(f"/v1/jobs/{job}/retry", {"env": {}})
    assert early.status_code == 409
    assert "queued" in early.json["detail"]
    ada.post(f"/v1/jobs/{job}/cancel")
    answer = ada.post(f"/v1/jobs/{job}/retry", {"env": {"HF_TOKEN": "new"}})
    assert answer.status_code == 200
    assert answer.json["status"] == "queued"
    assert fleet.jobs.secrets(job) == {"HF_TOKEN": "new"}


def test_retry_needs_no_body_and_refuses_bad_names(ada: Any) -> None:
    job = ada.submit()
    ada.post(f"/v1/jobs/{job}/cancel")
    bad = ada.post(f"/v1/jobs/{job}/retry", {"env": {"PYTHONPATH": "x"}})
    assert bad.status_code == 422
    assert bad.json["errors"][0]["path"] == "env.PYTHONPATH"
    assert ada.post(f"/v1/jobs/{job}/retry").status_code == 200


def test_a_completed_job_with_nothing_left_is_not_retried(ada: Any, fleet: Fleet) -> None:
    job = ada.submit()
    run = HandRun(fleet, job, units=1)
    run.work(record(0))
    run.finish()
    answer = ada.post(f"/v1/jobs/{job}/retry")
    assert answer.status_code == 409
    assert "no missing" in answer.json["detail"]


def test_an_owner_cannot_flood_the_fleet(ada: Any, bob: Any) -> None:
    jobs = [ada.submit() for _ in range(20)]  # the settings of these tests allow 20
    refused = ada.post("/v1/jobs", {"job": JOB})
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) > 0
    bob.submit()
    ada.post(f"/v1/jobs/{jobs[0]}/cancel")
    ada.submit()


def test_metrics_name_no_owner_and_no_job(ada: Any, app: Flask) -> None:
    job = ada.submit()
    ada.get(f"/v1/jobs/{job}")
    text = ada.get("/metrics").text
    assert 'spider_jobs_submitted_total{queue="offline-gen"} 1.0' in text
    assert 'route="/v1/jobs/<job_id>"' in text
    assert "spider_jobs_active 1.0" in text
    assert "ada" not in text
    assert job not in text
