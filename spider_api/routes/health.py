"""Is it there, and can it work? The two routes that need no key."""

from __future__ import annotations

__all__ = ["blueprint"]

from flask import Response

from spider_api.blueprint import Blueprint, json_response
from spider_api.context import current
from spider_api.schemas import HealthSchema

blueprint = Blueprint("health", __name__, description="Whether the server lives")


@blueprint.route("/healthz")
@blueprint.response(200, HealthSchema)
def healthz() -> Response:
    """The process answers."""
    return json_response({"status": "ok"})


@blueprint.route("/readyz")
@blueprint.response(200, HealthSchema)
def readyz() -> Response:
    """Jobs can be submitted: Redis answers. 503 where it does not."""
    current().fleet.ping()
    return json_response({"status": "ready"})
