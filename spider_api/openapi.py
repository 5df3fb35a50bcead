"""The OpenAPI document: what flask-smorest collects, with our problems and our key."""

from __future__ import annotations

__all__ = ["describe"]

import re
from typing import Any, Final

from flask import Flask
from flask_smorest import Api as SmorestApi

from spider_api.auth import OPEN
from spider_api.problems import MEDIA_TYPE
from spider_api.schemas import ProblemSchema
from spider_sdk.config.describe import job_schema, swe_job_schema

_METHODS: Final = frozenset({"delete", "get", "head", "options", "patch", "post", "put"})
_VARIABLE: Final = re.compile(r"<(?:\w+:)?(\w+)>")


def describe(app: Flask, smorest: SmorestApi) -> dict[str, Any]:
    """The document as it is served. Every operation may answer with a problem document, which
    ``default`` says once; every one but the health checks needs a key."""
    spec = smorest.spec
    spec.components.schema("Problem", schema=ProblemSchema)
    spec.components.security_scheme("key", {"type": "http", "scheme": "bearer"})
    document: dict[str, Any] = spec.to_dict()
    failure = {
        "description": "A problem document (RFC 9457)",
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    endpoints = _endpoints(app)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if method not in _METHODS:
                continue
            endpoint = endpoints[method, path]
            operation["operationId"] = endpoint.rpartition(".")[2]
            fine = {
                code: answer
                for code, answer in operation["responses"].items()
                if str(code).startswith("2")
            }
            operation["responses"] = {**fine, "default": failure}
            if endpoint in OPEN:
                operation["security"] = []
    document["components"].pop("responses", None)
    schemas = document["components"]["schemas"]
    schemas["Job"] = job_schema()
    schemas["SweJob"] = swe_job_schema()
    schemas["Submit"]["properties"]["job"] = {
        "anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in ("Job", "SweJob")]
    }
    document["security"] = [{"key": []}]
    return document


def _endpoints(app: Flask) -> dict[tuple[str, str], str]:
    """(method, path as OpenAPI writes it) → Flask's endpoint."""
    return {
        (method.lower(), _VARIABLE.sub(r"{\1}", rule.rule)): rule.endpoint
        for rule in app.url_map.iter_rules()
        for method in rule.methods or ()
    }
