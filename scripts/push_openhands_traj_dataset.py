"""Push a run's trajectories to a data set on the Hub, by hand.

Set the constants below, or give flags, which win over them; the token comes from HF_TOKEN::

    export HF_TOKEN="hf_..."
    python3 scripts/push_openhands_traj_dataset.py --input trajectories/.../output.jsonl \\
        --repo-id your-org/your-dataset-name

A second push of the same file changes nothing. Other configurations in the repository stay.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from spider_sdk.errors import SpiderError
from spider_worker.trajectories.filters import FILTERS
from spider_worker.trajectories.known_secrets import known_secrets
from spider_worker.trajectories.layout import METADATA
from spider_worker.trajectories.messages import FORMATS
from spider_worker.trajectories.metadata import read_metadata
from spider_worker.trajectories.push import push

#: The run's file.
OUTPUT_JSONL = "trajectories/SWE-bench__SWE-smith-train/CodeActAgent/gpt-4o_maxiter_30/output.jsonl"
#: The data set, created where there is none yet.
REPO_ID = "your-org/your-dataset-name"
#: Whether to create it as a private one.
PRIVATE = True
#: The configuration; None makes a name of model, data set and iterations.
CONFIG_NAME: str | None = None
#: Which runs: all, finished or resolved.
PUSH_FILTER = "all"
#: How messages are written: text (role and content) or openai (with tool calls).
MESSAGES_FORMAT = "text"
#: Environment variables whose values must not be in the data set, beside those that sound like
#: keys (*_API_KEY, *_TOKEN …) and the one that the run's metadata.json names.
SECRET_VARIABLES: tuple[str, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    names = [*SECRET_VARIABLES, *options.secret_env]
    output = Path(options.input)
    try:
        metadata = read_metadata(output.with_name(METADATA))
        pushed = push(
            output,
            options.repo_id,
            token=os.environ.get("HF_TOKEN"),
            private=options.private,
            config_name=options.config_name,
            push_filter=options.push_filter,
            messages_format=options.messages_format,
            secrets=known_secrets(os.environ, metadata, names),
        )
    except SpiderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for instance, kinds in sorted(pushed.redacted.items()):
        found = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
        print(f"taken out of {instance}: {found}", file=sys.stderr)
    if pushed.left_out:
        print(f"left out, without a turn of the agent: {pushed.left_out} runs", file=sys.stderr)
    done = "pushed" if pushed.committed else "stood there already"
    print(f"{pushed.url}: {pushed.rows} rows in configuration {pushed.config} ({done})")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--input", default=OUTPUT_JSONL, help="the run's output.jsonl")
    parser.add_argument("--repo-id", default=REPO_ID, help="namespace/name on the Hub")
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        default=PRIVATE,
        help="a new repository is private",
    )
    parser.add_argument("--config-name", default=CONFIG_NAME, help="the configuration's name")
    parser.add_argument("--push-filter", choices=list(FILTERS), default=PUSH_FILTER, help="runs")
    parser.add_argument(
        "--messages-format", choices=FORMATS, default=MESSAGES_FORMAT, help="how messages are kept"
    )
    parser.add_argument(
        "--secret-env",
        action="append",
        default=[],
        metavar="NAME",
        help="a further variable whose value must not be in the data set",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
