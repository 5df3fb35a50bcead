"""``spider-scaffold push``."""

from __future__ import annotations

__all__ = ["publish", "push"]

import os
from collections.abc import Sequence
from pathlib import Path

import click

from spider_scaffold.report import counted
from spider_sdk.cli.options import pass_state
from spider_sdk.cli.state import State, json_option
from spider_sdk.errors import FatalJobError, PipelineError, ServerUnreachable
from spider_worker.trajectories.filters import FILTERS
from spider_worker.trajectories.layout import METADATA
from spider_worker.trajectories.messages import FORMATS
from spider_worker.trajectories.metadata import read_metadata


@click.command()
@click.option(
    "--input",
    "output",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The run's output.jsonl.",
)
@click.option("--repo-id", required=True, metavar="OWNER/NAME", help="The data set on the Hub.")
@click.option("--private", is_flag=True, help="A new repository is private.")
@click.option(
    "--config-name", metavar="NAME", help="Default: made of model, data set and iterations."
)
@click.option(
    "--push-filter", type=click.Choice(list(FILTERS)), default="all", show_default=True,
    help="Which runs.",
)  # fmt: skip
@click.option(
    "--messages-format", type=click.Choice(FORMATS), default="text", show_default=True,
    help="openai: as the model saw them, with tool calls; text: role and content.",
)  # fmt: skip
@click.option(
    "--secret-env", "names", multiple=True, metavar="NAME",
    help="A variable whose value must not be in the data set (repeatable).",
)  # fmt: skip
@json_option
@pass_state
def push(
    state: State,
    output: Path,
    repo_id: str,
    private: bool,
    config_name: str | None,
    push_filter: str,
    messages_format: str,
    names: tuple[str, ...],
) -> None:
    """Publish a run's trajectories as a configuration of a data set on the Hub.

    Needs HF_TOKEN. Values of variables that sound like keys, and whatever looks like a key, are
    taken out first. Pushing the same file again changes nothing; other configurations stay.
    """
    publish(
        state,
        output,
        repo_id,
        private=private,
        config_name=config_name,
        push_filter=push_filter,
        messages_format=messages_format,
        token=os.environ.get("HF_TOKEN"),
        secrets=[os.environ[name] for name in names if os.environ.get(name)],
    )


def publish(
    state: State,
    output: Path,
    repo_id: str,
    *,
    private: bool,
    config_name: str | None,
    push_filter: str,
    messages_format: str,
    token: str | None,
    secrets: Sequence[str],
) -> None:
    """Push and say what came of it. ``secrets`` are taken out besides those that variables of this
    process hold (``known_secrets``). Raises ServerUnreachable where the Hub does not answer, and
    otherwise what ``trajectories.push`` raises."""
    # Here, not above: pyarrow and huggingface_hub are not for the help.
    from spider_worker.trajectories import push as pushing
    from spider_worker.trajectories.known_secrets import known_secrets

    metadata = read_metadata(output.with_name(METADATA))
    try:
        pushed = pushing.push(
            output,
            repo_id,
            token=token,
            private=private,
            config_name=config_name,
            push_filter=push_filter,
            messages_format=messages_format,
            secrets=[*secrets, *known_secrets(os.environ, metadata)],
        )
    except FatalJobError:
        raise
    except PipelineError as error:
        raise ServerUnreachable(error.message) from error
    if state.json:
        state.emit(
            {
                "url": pushed.url,
                "config": pushed.config,
                "rows": pushed.rows,
                "committed": pushed.committed,
                "left_out": pushed.left_out,
                "redacted": {name: dict(kinds) for name, kinds in pushed.redacted.items()},
            }
        )
        return
    for instance, kinds in sorted(pushed.redacted.items()):
        found = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
        state.note(f"taken out of {instance}: {found}")
    if pushed.left_out:
        state.note(f"left out, without a turn of the agent: {counted(pushed.left_out, 'run')}")
    rows = "1 row" if pushed.rows == 1 else f"{pushed.rows:,} rows"
    done = "pushed" if pushed.committed else "stood there already"
    state.say(f"{pushed.url}: {rows} in configuration {pushed.config}, {done}")
