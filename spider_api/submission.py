"""What is asked of a job before it is accepted."""

from __future__ import annotations

__all__ = ["Accepted", "check_env", "check_quota", "check_submission"]

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from werkzeug.exceptions import TooManyRequests

from spider_api.context import Api
from spider_sdk.config import check_env_names, check_submittable, parse_job, strip_secrets
from spider_sdk.errors import ConfigError, Problem
from spider_sdk.jobs import Queue
from spider_worker.fleet import InputStore
from spider_worker.fleet.quota import active_jobs

MAX_ENV = 200  #: variables a job
MAX_ENV_VALUE = 64 * 1024  #: characters of one value
QUOTA_WAIT = 30  #: seconds that a 429 asks to wait


@dataclasses.dataclass(frozen=True)
class Accepted:
    """A job as it will be recorded: its document without secrets, and the secrets apart."""

    document: dict[str, Any]
    env: dict[str, str]
    queue: Queue


def check_submission(api: Api, job: Mapping[str, Any], env: Mapping[str, str]) -> Accepted:
    """Check everything that can be checked before the job runs.

    Secrets that stand in the document are moved into ``env``, whatever the client did about
    them. Raises ConfigError with every problem at once.
    """
    problems: list[Problem] = []
    queue = Queue.OFFLINE_GEN
    try:
        document, lifted = strip_secrets(job)
    except ConfigError as error:
        problems += error.problems
        document, lifted = dict(job), {}  # to be looked at, never to be kept
    merged = {**env, **lifted}
    try:
        check_env(merged)
    except ConfigError as error:
        problems += error.problems
    try:
        config = parse_job(document)
        queue = config.queue
        check_submittable(config)
    except ConfigError as error:
        problems += error.problems
    problems += api.policy.problems(document)
    if not problems:
        problems += _missing_inputs(api.fleet.inputs, document)
    if problems:
        first = {(problem.path, problem.message): problem for problem in reversed(problems)}
        raise ConfigError(list(first.values())[::-1])
    return Accepted(document, merged, queue)


def check_env(env: Mapping[str, str]) -> None:
    """Raises ConfigError, which never shows a value."""
    check_env_names(env)
    problems = [
        Problem(f"env.{name}", f"longer than {MAX_ENV_VALUE} characters")
        for name, value in env.items()
        if len(value) > MAX_ENV_VALUE
    ]
    problems += [
        Problem(f"env.{name}", "holds a NUL, which no environment variable can")
        for name, value in env.items()
        if "\0" in value
    ]
    if len(env) > MAX_ENV:
        problems.append(Problem("env", f"more than {MAX_ENV} variables"))
    if problems:
        raise ConfigError(problems)


def check_quota(api: Api, owner: str) -> None:
    """Raises TooManyRequests where the owner has too many jobs that have not ended.

    Jobs submitted at the same moment may pass together: the limit guards the fleet against a
    loop that submits, and is not an account.
    """
    most = api.settings.max_active_jobs
    if most and active_jobs(api.fleet, owner, most) >= most:
        raise TooManyRequests(
            f"{most} of your jobs are queued or running, which is as many as this server takes; "
            "wait for some to end or cancel them",
            retry_after=QUOTA_WAIT,
        )


def _missing_inputs(inputs: InputStore, document: Mapping[str, Any]) -> Iterator[Problem]:
    swe = document.get("swe")
    where, data = ("inputs", swe) if swe else ("job.source.inputs", document.get("source", {}))
    for number, item in enumerate(data.get("inputs") or ()):
        if not inputs.has(item["sha256"]):
            yield Problem(
                f"{where}.{number}",
                f"{item['name']} was not uploaded: PUT it to /v1/inputs/{item['sha256']} first",
            )
