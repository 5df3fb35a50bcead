"""``spider submit``."""

from __future__ import annotations

__all__ = ["submit"]

from pathlib import Path

import click

from spider_sdk.cli.follow import conclude, follow, options_again, say_forwarded
from spider_sdk.cli.options import (
    connect,
    env_option,
    load_config,
    pass_state,
    set_option,
)
from spider_sdk.cli.state import Detached, State, json_option
from spider_sdk.client import Client, new_idempotency_key
from spider_sdk.jobs import Submission


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--follow/--detach",
    "following",
    default=True,
    help="Follow the job to its end (the default), or return once it is accepted.",
)
@set_option
@env_option
@click.option(
    "--pre-processor", metavar="FILE.PY:FUNCTION", help="Function that makes a prompt of a row."
)
@click.option(
    "--post-processor", metavar="FILE.PY:FUNCTION", help="Function that makes a record of a row."
)
@click.option(
    "--evaluator",
    metavar="FILE.PY:FUNCTION",
    help="Function that scores the student of an on-policy job.",
)
@click.option(
    "--idempotency-key",
    metavar="TEXT",
    help="Submitting the same job again with the same key, within a day, makes no second one.",
)
@click.option("--base-url", metavar="URL", help="Where the API is.")
@json_option
@pass_state
def submit(
    state: State,
    config: Path,
    following: bool,
    sets: tuple[str, ...],
    env: tuple[str, ...],
    pre_processor: str | None,
    post_processor: str | None,
    evaluator: str | None,
    idempotency_key: str | None,
    base_url: str | None,
) -> None:
    """Submit the job that CONFIG describes and follow it to its end.

    Ctrl-C while following leaves the job running. A job that completes is downloaded to
    output.local_path where the config has one.
    """
    loaded = load_config(config, sets)
    again = options_again(config if loaded.server.base_url else None, base_url)
    with connect(
        loaded,
        base_url,
        env=env,
        pre_processor=pre_processor,
        post_processor=post_processor,
        evaluator=evaluator,
    ) as client:
        submission = _submit(client, state, idempotency_key or new_idempotency_key())
        job_id = submission["job_id"]
        if state.json:
            state.emit(submission)
        state.say(f"job {job_id} {submission['status']}")
        if not following:
            state.say(f"follow it with: spider watch {job_id}{again}")
            return
        document = follow(client, state, job_id, again=again)
        conclude(client, state, document, again)


def _submit(client: Client, state: State, key: str) -> Submission:
    say_forwarded(state, client.forwarded)
    try:
        return client.submit_job(idempotency_key=key)
    except KeyboardInterrupt:
        raise Detached(
            "interrupted while submitting: the job may have been accepted. Look with: spider list; "
            f"to submit without the risk of a second job add: --idempotency-key {key}"
        ) from None
