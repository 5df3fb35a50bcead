"""What Prometheus reads, and what the API says about itself."""

from __future__ import annotations

__all__ = ["blueprint"]

from typing import Final

from flask import Response, current_app
from prometheus_client import CONTENT_TYPE_LATEST

from spider_api.blueprint import Blueprint, json_response
from spider_api.context import current
from spider_worker.fleet.quota import active_total

SPEC: Final = "spider_openapi"

blueprint = Blueprint("metrics", __name__, description="Figures and the API's description")


@blueprint.route("/metrics")
@blueprint.response(200, {"type": "string"}, content_type="text/plain")
def metrics() -> Response:
    """Figures of this server and of the fleet in Prometheus's text format."""
    api = current()
    api.metrics.active.set(active_total(api.fleet))
    return Response(api.metrics.render(), content_type=CONTENT_TYPE_LATEST)


@blueprint.route("/openapi.json")
@blueprint.response(200, {"type": "object"})
def openapi() -> Response:
    """This document."""
    return json_response(current_app.extensions[SPEC])
