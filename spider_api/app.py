"""The Flask app."""

from __future__ import annotations

__all__ = ["create_app"]

from flask import Flask, Response
from flask_smorest import Api as SmorestApi

from spider_api import auth, problems
from spider_api.context import Api
from spider_api.metrics import Metrics
from spider_api.openapi import describe
from spider_api.policy import Policy
from spider_api.routes import BLUEPRINTS
from spider_api.routes.metrics import SPEC
from spider_api.settings import ApiSettings
from spider_sdk import settings as settings_of
from spider_worker.fleet import Fleet
from spider_worker.fleet.keys import ApiKeys
from spider_worker.fleet.live import LiveReader
from spider_worker.settings import FleetSettings, WorkerSettings


def create_app(
    settings: ApiSettings | None = None,
    fleet: Fleet | None = None,
    *,
    policy: Policy | None = None,
) -> Flask:
    """An app over ``fleet``; what is not given comes from the SPIDER_* settings.

    Starts no thread: whoever serves the app calls ``start_reaper`` on its ``Api``. Raises
    ConfigError for a bad setting and FleetError for a bad secret key.
    """
    settings = settings or settings_of.load(ApiSettings)
    fleet = fleet or Fleet.connect(settings_of.load(FleetSettings))
    app = Flask("spider_api", static_folder=None)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.config.update(
        MAX_CONTENT_LENGTH=settings.max_body,
        API_TITLE="Spider",
        API_VERSION="1",
        OPENAPI_VERSION="3.1.0",
        API_SPEC_OPTIONS={
            "info": {"description": "Distillation jobs on a fleet."},
        },
    )
    api = Api(
        settings=settings,
        fleet=fleet,
        keys=ApiKeys(fleet.redis, fleet.secret_box),
        live=LiveReader(fleet.settings.redis_url, backlog=settings.sse_backlog),
        policy=policy or Policy.from_settings(settings_of.load(WorkerSettings)),
        metrics=Metrics(),
    )
    api.install(app)
    api.metrics.watch(app)
    app.before_request(auth.check_key)
    app.after_request(_headers)
    smorest = SmorestApi(app)
    for blueprint in BLUEPRINTS:
        smorest.register_blueprint(blueprint)
    problems.register(app)
    app.extensions[SPEC] = describe(app, smorest)
    return app


def _headers(response: Response) -> Response:
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response
