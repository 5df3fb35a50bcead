"""Local data of clients', uploaded by content before a job that names it."""

from __future__ import annotations

__all__ = ["blueprint"]

from typing import Any

from flask import Response, request

from spider_api.blueprint import Blueprint, json_response
from spider_api.context import current
from spider_api.schemas import InputSchema

blueprint = Blueprint("inputs", __name__, url_prefix="/v1/inputs", description="Uploaded data")

CONTENT: dict[str, Any] = {
    "required": True,
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}


@blueprint.route("/<sha256>", methods=["PUT"])
@blueprint.doc(requestBody=CONTENT)
@blueprint.response(201, InputSchema)
@blueprint.alt_response(200, schema=InputSchema)
def upload(sha256: str) -> Response:
    """Store a file under its SHA-256 (lower-case hexadecimal). 422 where the content has
    another one; 200, without reading it, where it is there already."""
    api = current()
    path = api.fleet.inputs.path(sha256)
    if api.fleet.inputs.has(sha256):
        return json_response({"sha256": sha256, "size": path.stat().st_size})
    request.max_content_length = api.settings.max_input
    size = api.fleet.inputs.put(sha256, request.stream)
    api.metrics.uploaded.inc(size)
    return json_response({"sha256": sha256, "size": size}, 201)


@blueprint.route("/<sha256>", methods=["HEAD"])
@blueprint.response(200)
def is_there(sha256: str) -> Response:
    """200 where the input is there, 404 where it has to be uploaded."""
    inputs = current().fleet.inputs
    return Response(status=200 if inputs.has(sha256) else 404)
