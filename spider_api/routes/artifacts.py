"""The files of a job, by the names of its manifest."""

from __future__ import annotations

__all__ = ["blueprint"]

from urllib.parse import quote

from flask import Response, send_file
from werkzeug.exceptions import NotFound

from spider_api.auth import owner
from spider_api.blueprint import Blueprint, json_response
from spider_api.context import current
from spider_api.schemas import ArtifactListSchema

BINARY = {"type": "string", "format": "binary"}

blueprint = Blueprint("artifacts", __name__, url_prefix="/v1/jobs", description="Files of a job")


@blueprint.route("/<job_id>/artifacts")
@blueprint.response(200, ArtifactListSchema)
def list_artifacts(job_id: str) -> Response:
    """What can be downloaded, data shards in order first."""
    fleet = current().fleet
    fleet.jobs.get(job_id, owner())
    artifacts = [
        {
            "name": entry.name,
            "size": entry.size,
            "media_type": entry.media_type,
            "created_at": entry.created_at,
            "sha256": entry.sha256,
            "complete": entry.complete,
            "path": f"/v1/jobs/{job_id}/artifacts/{quote(entry.name)}",
        }
        for entry in fleet.artifacts.list(job_id)
    ]
    return json_response({"artifacts": artifacts})


@blueprint.route("/<job_id>/artifacts/<path:name>")
@blueprint.response(200, BINARY, content_type="*/*")
@blueprint.alt_response(206, schema=BINARY, content_type="*/*")
def artifact(job_id: str, name: str) -> Response:
    """One file; ``Range`` and ``If-Range`` are honoured.

    The name is looked up in the manifest and never becomes a path.
    """
    fleet = current().fleet
    fleet.jobs.get(job_id, owner())
    entry = next((item for item in fleet.artifacts.list(job_id) if item.name == name), None)
    if entry is None:
        raise NotFound(f"job {job_id} has no artifact {name!r}")
    return send_file(
        fleet.artifacts.path(entry),
        entry.media_type,
        as_attachment=True,
        download_name=name.rpartition("/")[2],
        conditional=True,
        etag=f"{entry.unit}-{entry.version}",
    )
