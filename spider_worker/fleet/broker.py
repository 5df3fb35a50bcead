"""The Celery app of the fleet, as API and workers both need it: to publish and to consume hints.

A message is a hint that carries a job's id and nothing else. Everything here follows from
that: acknowledge at once, never redeliver, keep no results, let the reaper repeat what is
lost. The reasons for each setting are the failures it prevents.
"""

from __future__ import annotations

__all__ = ["ALIAS", "HINT_TASK", "Hints", "check_queues", "make_app"]

import logging

import click
import kombu
from celery import Celery
from celery.app.amqp import AMQP, Queues
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from spider_sdk.jobs import QUEUES
from spider_worker.fleet.names import PREFIX
from spider_worker.settings import FleetSettings

ALIAS = "gpu"
"""``-Q gpu`` means every queue of the fleet."""

HINT_TASK = "spider.work"

logger = logging.getLogger(__name__)


class FleetQueues(Queues):  # type: ignore[misc]
    """Expands the alias where a worker selects its queues, and nowhere else: publishing to
    ``gpu`` still raises QueueNotFound, and a typo still stops the worker."""

    def select(self, include: str | list[str]) -> None:
        super().select(check_queues(include))

    def deselect(self, exclude: str | list[str]) -> None:
        super().deselect(_expand(exclude))


class FleetAMQP(AMQP):  # type: ignore[misc]
    queues_cls = FleetQueues


def check_queues(names: str | list[str]) -> list[str]:
    """The queues that ``-Q names`` means. Raises click's UsageError, which Celery's command line
    and ours both show without a traceback, for a name that is none."""
    queues = _expand(names)
    unknown = [name for name in queues if name not in QUEUES]
    if unknown:
        known = f"{', '.join(QUEUES)}, or {ALIAS} for all of them"
        raise click.UsageError(f"there is no queue {', '.join(map(repr, unknown))}: {known}")
    return queues


def _expand(names: str | list[str]) -> list[str]:
    given = [names] if isinstance(names, str) else list(names or ())
    return [queue for name in given for queue in (QUEUES if name == ALIAS else (name,))]


def make_app(settings: FleetSettings) -> Celery:
    """The configured app, without tasks."""
    app = Celery("spider", broker=settings.redis_url, set_as_current=False)
    app.amqp_cls = FleetAMQP
    exchange = kombu.Exchange("spider", type="direct")
    app.conf.update(
        task_queues=[kombu.Queue(name, exchange, routing_key=name) for name in QUEUES],
        task_default_queue=QUEUES[0],
        task_default_exchange="spider",
        task_default_routing_key=QUEUES[0],
        task_create_missing_queues=False,
        task_acks_late=False,  # late acknowledgement redelivers running jobs
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_publish_retry=False,  # the reaper repeats hints
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,  # a second hint must go to a worker that is free
        worker_pool="threads",  # a supervisor starts processes; prefork would forbid it
        worker_concurrency=1,
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": 86400,
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "global_keyprefix": PREFIX,
            "max_retries": 1,  # of a publisher; consumers reconnect for ever
        },
        worker_send_task_events=True,  # flower sees the fleet without being asked to enable it
    )
    return app


class Hints:
    """Publishes hints. A lost one costs time, never a job."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def publish(self, job_id: str, queue: str) -> bool:
        """Tell some worker of ``queue`` to look at the job; False where the broker is away."""
        try:
            with self._app.producer_or_acquire() as producer:
                # Declared anew each time, without kombu's cache: the binding is a key of Redis,
                # and whoever deleted the broker's keys deleted it too.
                self._app.amqp.queues[queue](producer.channel).declare()
                self._app.send_task(
                    HINT_TASK, args=[job_id], queue=queue, producer=producer, ignore_result=True
                )
        except (OperationalError, RedisError, OSError) as error:
            logger.warning("hint for job %s not published (the reaper will): %s", job_id, error)
            return False
        return True
