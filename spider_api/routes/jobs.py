"""Jobs: submit, look at, list, cancel, retry."""

from __future__ import annotations

__all__ = ["blueprint"]

from typing import Any

from flask import Response

from spider_api.auth import owner
from spider_api.blueprint import Blueprint, json_response
from spider_api.context import current
from spider_api.documents import brief_document, status_document
from spider_api.schemas import (
    IdempotencySchema,
    JobListQuerySchema,
    JobListSchema,
    RetrySchema,
    StatusQuerySchema,
    StatusSchema,
    SubmissionSchema,
    SubmitSchema,
)
from spider_api.submission import check_env, check_quota, check_submission
from spider_sdk.errors import ConfigError, Problem
from spider_sdk.jobs import JobStatus
from spider_worker.fleet import JobRecord
from spider_worker.fleet.quota import replays

blueprint = Blueprint("jobs", __name__, url_prefix="/v1/jobs", description="Jobs")


@blueprint.route("", methods=["POST"])
@blueprint.arguments(IdempotencySchema, location="headers")
@blueprint.arguments(SubmitSchema)
@blueprint.response(201, SubmissionSchema)
@blueprint.alt_response(200, schema=SubmissionSchema)
def submit(headers: dict[str, Any], body: dict[str, Any]) -> Response:
    """Submit a job. Whatever is wrong with it is told at once, by path."""
    api, me = current(), owner()
    idempotency_key = headers.get("idempotency_key")
    accepted = check_submission(api, body["job"], body["env"])
    known = idempotency_key is not None and replays(api.fleet, me, idempotency_key)
    if not known:
        check_quota(api, me)
    record = api.fleet.jobs.submit(
        me,
        accepted.document,
        accepted.env,
        queue=accepted.queue,
        idempotency_key=idempotency_key,
    )
    if not known:
        api.metrics.submitted.labels(record.queue.value).inc()
    # A repeated key gets the answer that its first use got, whatever became of the job since.
    answer = {"job_id": record.job_id, "status": JobStatus.QUEUED.value}
    return json_response(answer, 200 if known else 201)


@blueprint.route("")
@blueprint.arguments(JobListQuerySchema, location="query", unknown=None)
@blueprint.response(200, JobListSchema)
def list_jobs(query: dict[str, Any]) -> Response:
    """Your jobs, newest first, a page at a time."""
    status = query.get("status")
    try:
        records, cursor = current().fleet.jobs.list(
            owner(),
            status=None if status is None else JobStatus(status),
            limit=query["limit"],
            cursor=query.get("cursor"),
        )
    except ValueError as error:
        raise ConfigError([Problem("query.cursor", str(error))]) from error
    jobs = [brief_document(record, next_offset=0) for record in records]
    return json_response({"jobs": jobs, "next_cursor": cursor})


@blueprint.route("/<job_id>")
@blueprint.arguments(StatusQuerySchema, location="query", unknown=None)
@blueprint.response(200, StatusSchema)
def status(query: dict[str, Any], job_id: str) -> Response:
    """A job as it stands, with its events from ``since`` on, at most 1,000."""
    api = current()
    record = api.fleet.jobs.get(job_id, owner())
    return json_response(status_document(api.fleet, record, query["since"]))


@blueprint.route("/<job_id>/cancel", methods=["POST"])
@blueprint.response(200, StatusSchema)
def cancel(job_id: str) -> Response:
    """Ask a job to stop; what is finished is kept. An ended job stays as it is."""
    return _answer(current().fleet.jobs.cancel(job_id, owner()))


@blueprint.route("/<job_id>/retry", methods=["POST"])
@blueprint.arguments(RetrySchema, required=False)
@blueprint.response(200, StatusSchema)
def retry(body: dict[str, Any], job_id: str) -> Response:
    """Run an ended job's missing and errored rows again. 409 where there is nothing to do."""
    check_env(body["env"])
    jobs, budget = current().fleet.jobs, body["max_budget_total"]
    return _answer(jobs.retry(job_id, owner(), body["env"], budget=budget))


def _answer(record: JobRecord) -> Response:
    return json_response(brief_document(record, next_offset=record.next_offset))
