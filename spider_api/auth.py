"""Who asks: every route needs a key, except for those that say whether the server lives."""

from __future__ import annotations

__all__ = ["OPEN", "check_key", "owner"]

from typing import Final

from flask import Response, g, request

from spider_api.context import current
from spider_api.problems import problem

OPEN: Final = frozenset({"health.healthz", "health.readyz"})
"""Endpoints without a key. Everything else is closed, routes that do not exist included, so
that nobody learns without a key what is there."""

_CHALLENGE: Final = {"WWW-Authenticate": 'Bearer realm="spider"'}


def check_key() -> Response | None:
    """Before each request: sets the owner, or answers 401. Raises FleetUnavailable."""
    if request.endpoint in OPEN:
        return None
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        return problem(401, "an API key is needed: Authorization: Bearer sk_…", headers=_CHALLENGE)
    name = current().keys.authenticate(token.strip())
    if name is None:
        return problem(401, "this API key is not valid", headers=_CHALLENGE)
    g.owner = name
    return None


def owner() -> str:
    """The owner of the key that this request came with."""
    name: str = g.owner
    return name
