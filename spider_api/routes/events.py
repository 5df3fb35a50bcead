"""A job's events as a stream, and what its runners printed."""

from __future__ import annotations

__all__ = ["blueprint"]

from typing import Any

from flask import Response, request

from spider_api.auth import owner
from spider_api.blueprint import Blueprint
from spider_api.context import current
from spider_api.schemas import EventsQuerySchema, LastEventIdSchema
from spider_api.stream import EventStream, parse_event_id

blueprint = Blueprint("events", __name__, url_prefix="/v1/jobs", description="Following a job")


@blueprint.route("/<job_id>/events")
@blueprint.arguments(LastEventIdSchema, location="headers")
@blueprint.arguments(EventsQuerySchema, location="query", unknown=None)
@blueprint.response(200, {"type": "string"}, content_type="text/event-stream")
def events(headers: dict[str, Any], query: dict[str, Any], job_id: str) -> Response:
    """Server-sent events: what was missed, then live, until the job has ended.

    Messages carry an event's JSON and the id ``{offset}-1``. ``event: reset`` carries a status
    document where earlier events were trimmed, ``event: end`` the final one.
    """
    api = current()
    api.fleet.jobs.get(job_id, owner())
    after = parse_event_id(headers.get("last_event_id", ""))
    stream = EventStream(
        api.fleet,
        api.live,
        api.metrics,
        job_id,
        since=query.get("since", 0) if after is None else after,
        heartbeat=api.settings.sse_heartbeat,
    )
    _cut_after(api.settings.sse_send_timeout)
    body = () if request.method == "HEAD" else iter(stream)
    response = Response(body, mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"  # nginx would hold events back
    return response


@blueprint.route("/<job_id>/logs")
@blueprint.response(200, {"type": "string"}, content_type="text/plain")
def logs(job_id: str) -> Response:
    """What the job's runners printed, as text; empty where they printed nothing."""
    fleet = current().fleet
    fleet.jobs.get(job_id, owner())
    body = () if request.method == "HEAD" else fleet.artifacts.logs(job_id)
    return Response(body, content_type="text/plain; charset=utf-8")


def _cut_after(seconds: float) -> None:
    """Let a client that takes no data hold its connection no longer than that. gunicorn hands
    the socket on; under another server its own limits hold."""
    connection = request.environ.get("gunicorn.socket")
    if connection is not None:
        connection.settimeout(seconds)
