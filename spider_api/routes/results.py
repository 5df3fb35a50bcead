"""A job's records, finished or so far."""

from __future__ import annotations

__all__ = ["blueprint"]

from typing import Any

from flask import Response, request, send_file
from werkzeug.exceptions import NotFound

from spider_api import exports
from spider_api.auth import owner
from spider_api.blueprint import Blueprint
from spider_api.context import Api, current
from spider_api.documents import status_document
from spider_api.schemas import ResultQuerySchema, ResultSchema
from spider_sdk.jobs import JobStatus
from spider_worker.fleet import JobRecord

PARQUET = "application/vnd.apache.parquet"
JSONL = "application/x-ndjson"

blueprint = Blueprint("results", __name__, url_prefix="/v1/jobs", description="Results")


@blueprint.route("/<job_id>/result")
@blueprint.doc(
    responses={
        200: {
            "content": {
                JSONL: {"schema": {"type": "string"}},
                PARQUET: {"schema": {"type": "string", "format": "binary"}},
            }
        }
    }
)
@blueprint.arguments(ResultQuerySchema, location="query", unknown=None)
@blueprint.response(200, ResultSchema)
def result(query: dict[str, Any], job_id: str) -> Response:
    """All records, or those that there are so far; 404 while there is none.

    ``format=json`` is one document with the job's fields and ``artifact``, the records.
    """
    api = current()
    record = api.fleet.jobs.get(job_id, owner())
    if record.status is not JobStatus.COMPLETED and not api.fleet.results.has(job_id):
        raise NotFound(f"job {job_id} has no results yet")
    if query["format"] == "parquet":
        return _parquet(api, record)
    records = api.fleet.results.records(job_id)
    if query["format"] == "jsonl":
        response = Response(exports.lines(records), mimetype=JSONL)
    else:
        document = status_document(api.fleet, record)
        response = Response(exports.json_document(document, records), mimetype="application/json")
    if request.method == "HEAD":
        response.response = ()
    response.headers["Content-Disposition"] = f'attachment; filename="{job_id}.{query["format"]}"'
    return response


def _parquet(api: Api, record: JobRecord) -> Response:
    path = exports.parquet(api.fleet, record)
    name = f"{record.job_id}.parquet"
    if record.status.is_terminal:
        return send_file(
            path, PARQUET, as_attachment=True, download_name=name, conditional=True, etag=path.stem
        )
    file = path.open("rb")
    path.unlink()  # nobody else's; it is gone once it was sent
    return send_file(file, PARQUET, as_attachment=True, download_name=name)
