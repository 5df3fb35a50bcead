"""What every blueprint of the API shares: how request bodies are read."""

from __future__ import annotations

__all__ = ["Blueprint", "json_response"]

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import flask_smorest
import orjson
from flask import Request, Response
from marshmallow import Schema, missing
from webargs.flaskparser import FlaskParser
from werkzeug.exceptions import BadRequest, UnsupportedMediaType

Handler = Callable[..., Response]
Decorator = Callable[[Handler], Handler]


class StrictParser(FlaskParser):
    """Bodies are JSON and say so. Numbers that JSON does not know (NaN) are refused, so that
    what was stored can always be sent again."""

    def load_json(self, req: Request, schema: Schema) -> Any:  # noqa: ARG002 (webargs' signature)
        body = req.get_data()
        if not body:
            return missing
        if not req.is_json:
            raise UnsupportedMediaType("the body must be JSON (Content-Type: application/json)")
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise BadRequest(f"the body is no valid JSON: {error}") from error
        if not isinstance(document, dict):
            raise BadRequest("the body must be a JSON object")
        return document


class Blueprint(flask_smorest.Blueprint):  # type: ignore[misc]
    """flask-smorest's, with the parser above and with types, which it has none of."""

    ARGUMENTS_PARSER: ClassVar[FlaskParser] = StrictParser()

    if TYPE_CHECKING:

        def route(self, rule: str, *, methods: Sequence[str] = ...) -> Decorator: ...

        def arguments(
            self,
            schema: type[Schema],
            *,
            location: str = ...,
            required: bool = ...,
            unknown: str | None = ...,
        ) -> Decorator: ...

        def response(
            self, status: int, schema: object = ..., *, content_type: str = ...
        ) -> Decorator: ...

        def alt_response(
            self, status: int, *, schema: object = ..., content_type: str = ...
        ) -> Decorator: ...

        def doc(self, **options: Any) -> Decorator: ...


def json_response(document: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(document), status=status, mimetype="application/json")
