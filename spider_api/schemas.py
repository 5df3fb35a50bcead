"""The bodies and parameters of the API, as its OpenAPI document describes them.

Requests are checked with these. Answers are written by their handlers (a job's document is the
user's own JSON) and described here; a test holds live answers against the description.
"""

from __future__ import annotations

__all__ = [
    "ArtifactListSchema",
    "EventsQuerySchema",
    "HealthSchema",
    "IdempotencySchema",
    "InputSchema",
    "JobListQuerySchema",
    "JobListSchema",
    "LastEventIdSchema",
    "ProblemSchema",
    "ResultQuerySchema",
    "ResultSchema",
    "RetrySchema",
    "StatusQuerySchema",
    "StatusSchema",
    "SubmissionSchema",
    "SubmitSchema",
]

from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, validate, validates_schema

from spider_sdk.config import parse_job
from spider_sdk.errors import ConfigError
from spider_sdk.jobs import JobStatus

STATUSES = [status.value for status in JobStatus]


def _said(text: str) -> dict[str, str]:
    return {"description": text}


class Strict(Schema):
    """Refuses names that it does not know: nothing is accepted and then ignored."""

    class Meta:
        unknown = RAISE


class AnyObject(fields.Dict):
    """A JSON object whose members are the user's."""

    def __init__(self, **options: Any) -> None:
        super().__init__(keys=fields.String(), **options)


class SubmitSchema(Strict):
    job = AnyObject(
        required=True,
        metadata=_said("The job section of a config, or a SWE job's keys under swe."),
    )
    env = fields.Dict(
        keys=fields.String(),
        values=fields.String(),
        load_default=dict,
        metadata=_said("Secrets for the job's processes, by name; kept encrypted, never shown."),
    )

    @validates_schema(pass_original=True, skip_on_field_errors=False)
    def _problems_of_the_job(self, _data: Any, original: Any, **_: Any) -> None:
        """A body that is refused for something beside the job tells of the job as well; one
        that is not is checked whole, when it is submitted."""
        job = original.get("job") if isinstance(original, dict) else None
        if not isinstance(job, dict) or set(original) <= set(self.fields):
            return
        try:
            parse_job(job)
        except ConfigError as error:
            found: dict[str, list[str]] = {}
            for problem in error.problems:
                found.setdefault(problem.path, []).append(problem.message)
            raise ValidationError(found) from error


class RetrySchema(Strict):
    env = fields.Dict(
        keys=fields.String(),
        values=fields.String(),
        load_default=dict,
        metadata=_said("Secrets taken anew: those of the first attempt are gone."),
    )
    max_budget_total = fields.Float(
        load_default=None,
        allow_none=True,
        validate=validate.Range(min=0, min_inclusive=False),
        metadata=_said("US dollars; takes the place of a SWE job's. What was spent counts."),
    )


class SubmissionSchema(Schema):
    job_id = fields.String(required=True)
    status = fields.String(required=True, validate=validate.OneOf(STATUSES))


class EventSchema(Schema):
    offset = fields.Integer(required=True)
    timestamp = fields.String(required=True, metadata={"format": "date-time"})
    level = fields.String(required=True)
    code = fields.String(required=True)
    message = fields.String(required=True)
    data = AnyObject(required=True)


class JobFieldsSchema(Schema):
    job_id = fields.String(required=True)
    status = fields.String(required=True, validate=validate.OneOf(STATUSES))
    submitted_at = fields.String(required=True, metadata={"format": "date-time"})
    updated_at = fields.String(required=True, metadata={"format": "date-time"})
    messages = fields.List(fields.String(), required=True)
    error = fields.String(required=True, allow_none=True)
    artifacts_path = fields.String(required=True, allow_none=True)
    remote_artifact = fields.String(required=True, allow_none=True)
    metrics = fields.Dict(keys=fields.String(), values=fields.Float(allow_none=True), required=True)
    job = AnyObject(required=True, metadata=_said("The job as submitted, without secrets."))


class StatusSchema(JobFieldsSchema):
    events = fields.List(fields.Nested(EventSchema), required=True)
    events_next_offset = fields.Integer(required=True)
    events_start_offset = fields.Integer(required=True)
    events_truncated = fields.Boolean(required=True)


class ResultSchema(JobFieldsSchema):
    artifact = fields.List(AnyObject(), required=True, metadata=_said("The records."))


class JobListSchema(Schema):
    jobs = fields.List(fields.Nested(StatusSchema), required=True)
    next_cursor = fields.String(required=True, allow_none=True)


class ArtifactSchema(Schema):
    name = fields.String(required=True)
    size = fields.Integer(required=True, metadata=_said("Bytes."))
    media_type = fields.String(required=True)
    created_at = fields.String(required=True, metadata={"format": "date-time"})
    sha256 = fields.String(required=True, allow_none=True)
    complete = fields.Boolean(required=True)
    path = fields.String(required=True, metadata=_said("URL path to download it from."))


class ArtifactListSchema(Schema):
    artifacts = fields.List(fields.Nested(ArtifactSchema), required=True)


class InputSchema(Schema):
    sha256 = fields.String(required=True)
    size = fields.Integer(required=True, metadata=_said("Bytes."))


class HealthSchema(Schema):
    status = fields.String(required=True)


class ProblemFieldSchema(Schema):
    path = fields.String(required=True)
    message = fields.String(required=True)
    line = fields.Integer()


class ProblemSchema(Schema):
    type = fields.String(required=True)
    title = fields.String(required=True)
    status = fields.Integer(required=True)
    detail = fields.String(required=True)
    errors = fields.List(fields.Nested(ProblemFieldSchema))


class StatusQuerySchema(Strict):
    since = fields.Integer(
        load_default=0,
        validate=validate.Range(min=0, max=2**53),
        metadata=_said("Offset of the first event wanted."),
    )


class EventsQuerySchema(Strict):
    since = fields.Integer(
        validate=validate.Range(min=0, max=2**53),
        metadata=_said("Offset of the first event wanted; Last-Event-ID goes before it."),
    )


class LastEventIdSchema(Schema):
    last_event_id = fields.String(
        data_key="Last-Event-ID",
        metadata=_said("The id of the last event received; the stream goes on after it."),
    )


class IdempotencySchema(Schema):
    idempotency_key = fields.String(
        data_key="Idempotency-Key",
        validate=[
            validate.Length(min=1, max=255),
            validate.Regexp(r"[ -~]+\Z", error="Expected printable ASCII characters."),
        ],
        metadata=_said(
            "The same key and body within 24 hours get the first answer again (200); another "
            "body gets 422."
        ),
    )


class JobListQuerySchema(Strict):
    status = fields.String(validate=validate.OneOf(STATUSES))
    limit = fields.Integer(load_default=50, validate=validate.Range(min=1, max=200))
    cursor = fields.String()


class ResultQuerySchema(Strict):
    format = fields.String(
        load_default="json",
        validate=validate.OneOf(["json", "jsonl", "parquet"]),
        metadata=_said("json: the job's fields and its records; else the bare records."),
    )
