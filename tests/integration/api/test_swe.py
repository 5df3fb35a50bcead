"""SWE jobs over the wire: what is accepted, what is said of the rest, and from where on."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from spider_api.policy import Policy
from spider_sdk import AppConfig
from spider_sdk.jobs import Queue
from spider_worker.fleet import Fleet

SWE: dict[str, Any] = {
    "llm_model": "openai/m",
    "llm_base_url": "https://models.example/v1",
    "llm_api_key_env": "MODEL_KEY",
    "num_workers": 2,
    "max_budget_total": 10.0,
    "max_budget_per_instance": 2.0,
}
DATA = b'{"instance_id": "a"}\n'
SHA = hashlib.sha256(DATA).hexdigest()
CONFIG = Path(__file__).parents[3] / "config"


def submit(user: Any, env: dict[str, str] | None = None, **swe: Any) -> Any:
    return user.post("/v1/jobs", {"job": {"swe": {**SWE, **swe}}, "env": env or {}})


def complaints(answer: Any) -> dict[str, str]:
    assert answer.status_code == 422, answer.json
    return {error["path"]: error["message"] for error in answer.json["errors"]}


def test_a_swe_job_waits_on_its_queue_with_its_caps(ada: Any, fleet: Fleet) -> None:
    answer = submit(ada, {"MODEL_KEY": "k"})
    assert answer.status_code == 201
    job = answer.json["job_id"]
    record = fleet.jobs.get(job)
    assert record.queue is Queue.SWE_AGENT
    assert record.document == {"swe": SWE}
    assert fleet.redis.llen("spider:swe-agent") == 1
    fields = fleet.redis.hmget(f"spider:job:{job}", "max_live", "budget", "reserve", "max_runners")
    assert [float(value) if value else None for value in fields] == [2, 10, 2, None]
    assert ada.get(f"/v1/jobs/{job}").json["job"] == {"swe": SWE}


def test_what_is_not_given_has_the_formats_defaults(ada: Any, fleet: Fleet) -> None:
    answer = ada.post("/v1/jobs", {"job": {"swe": {"llm_model": "m", "num_workers": None}}})
    job = answer.json["job_id"]
    fields = fleet.redis.hmget(f"spider:job:{job}", "max_live", "budget", "reserve")
    assert fields == [b"1", b"", b""]


def test_a_key_in_the_document_is_taken_out_of_it(ada: Any, fleet: Fleet) -> None:
    job = submit(ada, llm_api_key="canary-key").json["job_id"]
    record = fleet.jobs.get(job)
    assert "canary-key" not in json.dumps(record.document)
    assert fleet.jobs.secrets(job) == {"MODEL_KEY": "canary-key"}


@pytest.mark.parametrize(
    ("swe", "path"),
    [
        ({"num_workers": 0}, "num_workers"),
        ({"numworkers": 1}, "numworkers"),
        ({"max_budget_total": 1.0}, "max_budget_total"),
        ({"instance_filter": "("}, "instance_filter"),
        ({"llm_base_url": "http://metadata.google.internal/v1"}, "llm_base_url"),
        ({"dataset": "/etc/passwd"}, "dataset"),
        ({"dataset": "../tasks.jsonl"}, "dataset"),
        ({"condenser": {"max_sise": 80}}, "condenser.max_sise"),
        ({"dataset": "t", "inputs": [{"name": "t", "sha256": "0" * 64}]}, "inputs.0"),
        ({"inputs": [{"name": "../t", "sha256": "0" * 64}]}, "inputs.0.name"),
    ],
)
def test_what_is_wrong_is_told_by_paths_as_in_the_file(
    ada: Any, swe: dict[str, Any], path: str
) -> None:
    assert set(complaints(submit(ada, **swe))) == {path}


def test_nothing_stands_beside_swe(ada: Any) -> None:
    answer = ada.post("/v1/jobs", {"job": {"swe": SWE, "model": {}}})
    assert "nothing beside" in complaints(answer)["job.model"]


def test_a_private_endpoint_is_the_operators_choice() -> None:
    private = Policy(resolve=lambda host, port: ["10.0.0.1"])
    assert [one.path for one in private.problems({"swe": SWE})] == ["llm_base_url"]
    assert not dataclasses.replace(private, allow_private_urls=True).problems({"swe": SWE})


def test_uploaded_tasks_are_named_by_content(ada: Any) -> None:
    ada.open("PUT", f"/v1/inputs/{SHA}", input_stream=io.BytesIO(DATA))
    inputs = [{"name": "tasks.jsonl", "sha256": SHA}]
    assert submit(ada, dataset="tasks.jsonl", inputs=inputs).status_code == 201


def test_a_retry_may_bring_a_larger_budget(ada: Any, fleet: Fleet) -> None:
    job = submit(ada).json["job_id"]
    ada.post(f"/v1/jobs/{job}/cancel", {})
    answer = ada.post(f"/v1/jobs/{job}/retry", {"max_budget_total": 0})
    assert answer.status_code == 422
    answer = ada.post(f"/v1/jobs/{job}/retry", {"max_budget_total": 1.5})
    assert set(complaints(answer)) == {"max_budget_total"}
    answer = ada.post(f"/v1/jobs/{job}/retry", {"max_budget_total": 20})
    assert answer.json["job"]["swe"]["max_budget_total"] == 20
    assert fleet.redis.hget(f"spider:job:{job}", "budget") == b"20.0"


def test_the_description_takes_the_jobs_that_ship(ada: Any) -> None:
    document = ada.get("/openapi.json").json
    options = document["components"]["schemas"]["Submit"]["properties"]["job"]["anyOf"]
    assert {"$ref": "#/components/schemas/SweJob"} in options
    validator = Draft202012Validator(document["components"]["schemas"]["SweJob"])
    for path in sorted((CONFIG / "swe").glob("*.yaml")):
        job = AppConfig.load(path, environ={}).document
        assert list(validator.iter_errors(job)) == []
    for wrong in ({"num_workers": 0}, {"condenser": 5}, {"other": 1}, {"inputs": [{"name": "x"}]}):
        assert not validator.is_valid({"swe": {**SWE, **wrong}})
    assert validator.is_valid({"swe": {**SWE, "condenser": False, "seed": None}})
