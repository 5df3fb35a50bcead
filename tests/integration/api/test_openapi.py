"""The OpenAPI document is true: it has every route, and live answers are as it says."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from jsonschema import Draft202012Validator

from spider_sdk.config import AppConfig
from spider_worker.fleet import Fleet
from tests.support.hand_run import HandRun, record

JOB: dict[str, Any] = {
    "model": {"provider": "openai", "name": "m", "base_url": "https://models.example/v1"},
    "source": {"dataset": "org/data", "field": "question"},
}
DATA = b"{}\n"
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def document(ada: Any) -> dict[str, Any]:
    answer: dict[str, Any] = ada.get("/openapi.json").json
    return answer


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method, path): operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method != "parameters"
    }


def test_it_has_every_route_and_no_other(app: Flask, document: dict[str, Any]) -> None:
    routes = set()
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        # Flask answers HEAD wherever it answers GET, and OPTIONS everywhere.
        methods = (rule.methods or set()) - {"OPTIONS"}
        methods -= {"HEAD"} if "GET" in methods else set()
        routes |= {(method.lower(), path) for method in methods}
    assert set(operations(document)) == routes
    assert document["openapi"].startswith("3.1")
    names = [operation["operationId"] for operation in operations(document).values()]
    assert len(set(names)) == len(names)


def test_it_says_which_routes_need_a_key(document: dict[str, Any]) -> None:
    assert document["security"] == [{"key": []}]
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    free = {path for (_, path), op in operations(document).items() if op.get("security") == []}
    assert free == {"/healthz", "/readyz"}


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    def references(tree: Any) -> list[str]:
        if isinstance(tree, dict):
            own = [tree["$ref"]] if isinstance(tree.get("$ref"), str) else []
            return own + [ref for value in tree.values() for ref in references(value)]
        if isinstance(tree, list):
            return [ref for value in tree for ref in references(value)]
        return []

    found = references(document)
    assert found
    for reference in found:
        node: Any = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_live_answers_are_as_it_says(ada: Any, fleet: Fleet, document: dict[str, Any]) -> None:
    """Every operation is called at least once with success and once with failure."""
    job = ada.submit(env={"HF_TOKEN": "x"})
    run = HandRun(fleet, job, units=1)
    run.work(record(0))
    ended = ada.submit()
    ada.post(f"/v1/jobs/{ended}/cancel")
    one = f"/v1/jobs/{job}"
    calls: list[tuple[str, str, str, dict[str, Any]]] = [
        ("post", "/v1/jobs", "/v1/jobs", {"json": {"job": JOB}}),
        ("post", "/v1/jobs", "/v1/jobs", {"json": {"job": {"modle": 1}}}),
        ("get", "/v1/jobs", "/v1/jobs", {}),
        ("get", "/v1/jobs", "/v1/jobs?limit=x", {}),
        ("get", "/v1/jobs/{job_id}", one, {}),
        ("get", "/v1/jobs/{job_id}", "/v1/jobs/none", {}),
        ("post", "/v1/jobs/{job_id}/retry", f"/v1/jobs/{ended}/retry", {"json": {}}),
        ("post", "/v1/jobs/{job_id}/retry", f"{one}/retry", {}),
        ("get", "/v1/jobs/{job_id}/events", f"/v1/jobs/{ended}/events", {"method": "HEAD"}),
        ("get", "/v1/jobs/{job_id}/events", f"{one}/events?x=1", {}),
        ("get", "/v1/jobs/{job_id}/logs", f"{one}/logs", {}),
        ("get", "/v1/jobs/{job_id}/logs", "/v1/jobs/none/logs", {}),
        ("get", "/v1/jobs/{job_id}/result", f"{one}/result", {}),
        ("get", "/v1/jobs/{job_id}/result", f"{one}/result?format=jsonl", {}),
        ("get", "/v1/jobs/{job_id}/result", f"{one}/result?format=parquet", {}),
        ("get", "/v1/jobs/{job_id}/result", f"/v1/jobs/{ended}/result", {}),
        ("get", "/v1/jobs/{job_id}/artifacts", f"{one}/artifacts", {}),
        ("get", "/v1/jobs/{job_id}/artifacts", "/v1/jobs/none/artifacts", {}),
        ("get", "/v1/jobs/{job_id}/artifacts/{name}", f"{one}/artifacts/shard-00000.jsonl", {}),
        ("get", "/v1/jobs/{job_id}/artifacts/{name}", f"{one}/artifacts/other", {}),
        ("put", "/v1/inputs/{sha256}", f"/v1/inputs/{SHA}", {"input_stream": io.BytesIO(DATA)}),
        ("put", "/v1/inputs/{sha256}", f"/v1/inputs/{SHA}", {}),
        ("put", "/v1/inputs/{sha256}", "/v1/inputs/x", {}),
        ("head", "/v1/inputs/{sha256}", f"/v1/inputs/{SHA}", {}),
        ("get", "/healthz", "/healthz", {}),
        ("get", "/readyz", "/readyz", {}),
        ("get", "/metrics", "/metrics", {}),
        ("get", "/openapi.json", "/openapi.json", {}),
        ("post", "/v1/jobs/{job_id}/cancel", f"{one}/cancel", {}),
        ("post", "/v1/jobs/{job_id}/cancel", "/v1/jobs/none/cancel", {}),
    ]
    known = operations(document)
    for method, path, url, options in calls:
        verb = options.pop("method", method.upper())
        answer = ada.open(verb, url, **options)
        assert answer.status_code < 500, (url, answer.text)
        check(document, known[method, path], answer, f"{verb} {url}")
    assert {(method, path) for method, path, _, _ in calls} == set(known)


def check(document: dict[str, Any], operation: dict[str, Any], answer: Any, what: str) -> None:
    responses = operation["responses"]
    described = responses.get(str(answer.status_code), responses["default"])
    if answer.status_code >= 400:
        assert described is responses["default"], what
    content = described.get("content")
    if content is None:
        assert answer.data == b"", what
        return
    kind = answer.content_type.partition(";")[0]
    assert kind in content or "*/*" in content, (what, kind)
    if kind in content and kind in ("application/json", "application/problem+json"):
        schema = {"components": document["components"], **content[kind]["schema"]}
        problems = [
            error.message for error in Draft202012Validator(schema).iter_errors(answer.json)
        ]
        assert problems == [], what


def test_what_it_says_of_bodies_is_what_is_asked(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["Submit"]
    assert schema["required"] == ["job"]
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {"job", "env"}


CONFIG = Path(__file__).parents[3] / "config"
JOBS = [path for path in sorted(CONFIG.rglob("*.yaml")) if path.parent.name != "swe"]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_it_describes_the_jobs_that_ship(document: dict[str, Any], path: Path) -> None:
    job = AppConfig.load(path, environ={}).document
    assert list(job_validator(document).iter_errors(job)) == []


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("source", "feild", "question"),
        ("source", "dataset", 5),
        ("source", "inputs", [{"name": "a.jsonl"}]),
        ("source", "max_examples", 0),
        ("model", "provider", "vlm"),
        ("model", "name", None),
        ("generation", "on_policy", "yes"),
        ("output", "hf", {"repo_id": "no-owner"}),
    ],
)
def test_what_it_refuses_is_refused(
    ada: Any, document: dict[str, Any], section: str, key: str, value: Any
) -> None:
    job = {**JOB, section: {**JOB.get(section, {}), key: value}}
    assert not job_validator(document).is_valid(job)
    answer = ada.post("/v1/jobs", {"job": job})
    assert answer.status_code == 422
    assert any(error["path"].startswith(f"job.{section}.") for error in answer.json["errors"])


def test_it_says_how_to_name_uploaded_data(ada: Any, document: dict[str, Any]) -> None:
    """A client that knows no more than this document submits a local file."""
    source = document["components"]["schemas"]["Job"]["properties"]["source"]
    inputs = source["properties"]["inputs"]
    assert "/v1/inputs/{sha256}" in inputs["description"]
    assert "put" in document["paths"]["/v1/inputs/{sha256}"]
    assert inputs["items"]["required"] == ["name", "sha256"]
    ada.open("PUT", f"/v1/inputs/{SHA}", input_stream=io.BytesIO(DATA))
    named = [{"name": "rows.jsonl", "sha256": SHA}]
    job = {**JOB, "source": {"dataset": "rows", "field": "q", "inputs": named}}
    assert job_validator(document).is_valid(job)
    assert ada.post("/v1/jobs", {"job": job}).status_code == 201


def test_an_empty_value_counts_as_not_given(ada: Any, document: dict[str, Any]) -> None:
    """Other clients write every key that they know, null where there is nothing to say."""
    job: dict[str, Any] = {**JOB, "output": {"mode": "return", "hf": None, "format": None}}
    job["source"] = {**JOB["source"], "revision": None, "shuffle": None, "inputs": None}
    job["generation"] = {"seed": None, "on_policy_options": None, "duplications": None}
    job |= {"pre_processor": None, "runtime": None, "tools": [], "parallelism": None}
    assert list(job_validator(document).iter_errors(job)) == []
    assert ada.post("/v1/jobs", {"job": job}).status_code == 201


def job_validator(document: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator(document["components"]["schemas"]["Job"])
