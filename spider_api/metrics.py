"""Figures for Prometheus: of this API's requests and streams, and of the fleet as a whole.

Nothing carries an owner or a job id as a label: whoever may read the metrics may not thereby
learn who does what. With several API processes the figures are summed over them, through the
folder that ``PROMETHEUS_MULTIPROC_DIR`` names (``server`` sets it).
"""

from __future__ import annotations

__all__ = ["Metrics"]

import os
import time
from typing import Final

from flask import Flask, Response, g, request
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

_BUCKETS: Final = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    def __init__(self) -> None:
        # A second series for each figure, which nobody asked for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "spider_http_requests_total",
            "Requests answered.",
            ["method", "route", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "spider_http_request_seconds",
            "Time to the beginning of the answer.",
            ["route"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self.submitted = Counter(
            "spider_jobs_submitted_total", "Jobs accepted.", ["queue"], registry=registry
        )
        self.uploaded = Counter(
            "spider_input_bytes_total", "Bytes of inputs stored.", registry=registry
        )
        self.clients = Gauge(
            "spider_sse_clients",
            "Clients that follow a job now.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.events = Counter("spider_sse_events_total", "Events sent to them.", registry=registry)
        self.dropped = Counter(
            "spider_sse_dropped_total", "Clients dropped for being slow.", registry=registry
        )
        self.active = Gauge(
            "spider_jobs_active",
            "Jobs of the whole fleet that have not ended.",
            registry=registry,
            multiprocess_mode="mostrecent",
        )

    def watch(self, app: Flask) -> None:
        """Count every request of ``app``'s."""
        app.before_request(_begin)
        app.after_request(self._end)

    def _end(self, response: Response) -> Response:
        # The rule, not the path: a label a job would grow without bound.
        route = request.url_rule.rule if request.url_rule is not None else "(none)"
        self.requests.labels(_method(), route, str(response.status_code)).inc()
        self.seconds.labels(route).observe(time.perf_counter() - g.began)
        return response

    def render(self) -> bytes:
        """The text that a scrape gets."""
        registry = self.registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def _begin() -> None:
    g.began = time.perf_counter()


def _method() -> str:
    """The method as a label; whatever somebody makes up is one value."""
    known = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
    return request.method if request.method in known else "(other)"
