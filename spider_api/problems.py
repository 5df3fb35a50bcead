"""Every error as a problem document (RFC 9457), whoever raised it.

::

    {"type": "about:blank", "title": "Not Found", "status": 404, "detail": "there is no job 7f"}

and, where fields of a request are wrong, ``"errors": [{"path", "message"}]``.
"""

from __future__ import annotations

__all__ = ["MEDIA_TYPE", "problem", "register"]

import errno
import http
import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import orjson
from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from spider_api.context import current
from spider_sdk.errors import (
    ArtifactNotFound,
    ConfigError,
    FleetError,
    FleetUnavailable,
    IdempotencyConflict,
    IllegalTransition,
    JobNotFound,
    NotSupported,
    UsageError,
)

logger = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/problem+json"

_STATUS: Final[Mapping[type[Exception], int]] = {
    ArtifactNotFound: 404,
    JobNotFound: 404,
    IllegalTransition: 409,
    IdempotencyConflict: 422,
    NotSupported: 422,
    UsageError: 422,
}

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def problem(
    status: int,
    detail: str,
    *,
    errors: Sequence[Mapping[str, Any]] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A problem document as a response."""
    document: dict[str, Any] = {
        "type": "about:blank",
        "title": http.HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
    }
    if errors:
        document["errors"] = list(errors)
    response = Response(orjson.dumps(document), status=status, mimetype=MEDIA_TYPE)
    response.headers.update(headers or {})
    return response


def register(app: Flask) -> None:
    """Answer every exception of ``app``'s with a problem document."""
    for kind, status in _STATUS.items():
        app.register_error_handler(kind, _plain(status))
    app.register_error_handler(ConfigError, _config_error)
    app.register_error_handler(FleetUnavailable, _unavailable)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(OSError, _os_error)
    app.register_error_handler(Exception, _unexpected)


def _plain(status: int) -> Any:
    def handle(error: Exception) -> Response:
        return problem(status, str(error))

    return handle


def _config_error(error: ConfigError) -> Response:
    fields = []
    for found in error.problems:
        field: dict[str, Any] = {"path": found.path, "message": found.message}
        if found.line is not None:
            field["line"] = found.line
        fields.append(field)
    count = len(fields)
    detail = str(error) if count == 1 else f"{count} problems, the first: {error.problems[0]}"
    return problem(422, detail, errors=fields)


def _unavailable(error: FleetError) -> Response:
    wait = str(current().settings.retry_after)
    return problem(503, f"{error}; nothing was accepted, try again", headers={"Retry-After": wait})


def _http_error(error: HTTPException) -> Response:
    if error.response is not None:
        # Raised with an answer of its own (a redirect, a 304): not an error of ours to word.
        return error.get_response()  # type: ignore[return-value]
    status = error.code or 500
    found = list(_fields(error))
    detail = _detail(error) if not found else "the request is not valid"
    headers = {
        name: value
        for name, value in error.get_headers()
        if name.lower() not in ("content-type", "content-length")
    }
    return problem(status, detail, errors=found, headers=headers)


def _detail(error: HTTPException) -> str:
    if error.description and error.description != type(error).description:
        return error.description
    if error.code == 404:
        return f"there is nothing at {request.path}"
    if error.code == 405:
        return f"{request.path} does not take {request.method}"
    if error.code == 413:
        return f"the body is larger than {request.max_content_length} bytes"
    return error.description or error.name


def _fields(error: HTTPException) -> Iterator[dict[str, str]]:
    """What webargs found, flattened: ``{"json": {"env": {"A": ["…"]}}}`` by dotted path."""
    messages = getattr(error, "data", {}).get("messages", {})
    for location, tree in messages.items():
        yield from _walk(tree, "" if location == "json" else location)


def _walk(tree: Any, path: str) -> Iterator[dict[str, str]]:
    if isinstance(tree, dict):
        for name, below in tree.items():
            skipped = name in ("_schema", "value", "key")
            here = path if skipped else f"{path}.{name}" if path else str(name)
            yield from _walk(below, here)
    else:
        for message in tree if isinstance(tree, list) else [tree]:
            yield {"path": path or "body", "message": str(message)}


def _os_error(error: OSError) -> Response:
    if error.errno in _FULL:
        logger.error("no space left for artifacts: %s", error)
        return _unavailable(FleetUnavailable("the server's disk is full"))
    return _unexpected(error)


def _unexpected(error: Exception) -> Response:
    """The boundary of the API: the log gets the traceback, the client a number to quote."""
    number = secrets.token_hex(4)
    logger.error("error %s: %s", number, type(error).__name__, exc_info=error)
    return problem(500, f"the server failed; its log has the details under error {number}")
