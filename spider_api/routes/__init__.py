"""The routes, one noun a module."""

from __future__ import annotations

__all__ = ["BLUEPRINTS"]

from spider_api.routes import artifacts, events, health, inputs, jobs, metrics, results

BLUEPRINTS = (
    jobs.blueprint,
    events.blueprint,
    results.blueprint,
    artifacts.blueprint,
    inputs.blueprint,
    health.blueprint,
    metrics.blueprint,
)
