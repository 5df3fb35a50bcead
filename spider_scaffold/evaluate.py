"""``spider-scaffold evaluate``."""

from __future__ import annotations

__all__ = ["evaluate"]

from pathlib import Path

import click

from spider_sdk.cli.options import pass_state
from spider_sdk.cli.state import State, json_option
from spider_sdk.errors import UsageError

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--input", "output", required=True, type=_FILE, help="The run's output.jsonl.")
@click.option(
    "-c", "--config", type=_FILE,
    help="Take data set, split, workspace, number and time from this config.",
)  # fmt: skip
@click.option("--dataset", metavar="NAME", help="Default: what metadata.json beside it says.")
@click.option("--split", metavar="NAME", help="Default: what metadata.json beside it says.")
@click.option(
    "--workspace", type=click.Choice(["docker", "bwrap", "local"]),
    help="Where tests run. Default: where the agents worked.",
)  # fmt: skip
@click.option("--num-workers", type=click.IntRange(1), help="Patches at once (default: 1).")
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
    help="For one run of a task's tests (default: 1800).",
)  # fmt: skip
@click.option(
    "--reruns", default=2, show_default=True, type=click.IntRange(0),
    help="How often tests that fail are run again.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Judge again what was judged before.")
@click.option(
    "--export", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Judge nothing: write predictions for the public harnesses there.",
)  # fmt: skip
@click.option(
    "--import", "imported", type=click.Path(exists=True, path_type=Path), metavar="REPORT",
    help="Judge nothing: take over the report of a public harness (a file, or its folder).",
)  # fmt: skip
@click.option(
    "--run", "number", default=0, show_default=True, type=click.IntRange(0),
    help="With --import: which of the independent runs (n_attempts) the report is of.",
)  # fmt: skip
@json_option
@pass_state
def evaluate(
    state: State,
    output: Path,
    config: Path | None,
    dataset: str | None,
    split: str | None,
    workspace: str | None,
    num_workers: int | None,
    timeout: float | None,
    reruns: int,
    force: bool,
    export: Path | None,
    imported: Path | None,
    number: int,
) -> None:
    """Apply each patch in a fresh checkout, run the task's tests, and write into the file whether
    it resolved its instance.

    What was judged before is left alone. A patch of which nothing can be said (no box, a task
    whose own solution fails) stays null, and is never counted as failed.
    """
    # Here, not above: data sets and pyarrow are not for the help.
    from spider_scaffold.judging import Settings, judge, say_tree
    from spider_scaffold.predictions import export_to, import_from

    if export is not None and imported is not None:
        raise UsageError("--export and --import are two commands: give one of them")
    if export is not None:
        export_to(state, output, export)
        return
    if imported is not None:
        import_from(state, output, imported, number)
        say_tree(state, output)
        return
    settings = Settings.gather(
        output,
        config,
        dataset=dataset,
        split=split,
        workspace=workspace,
        num_workers=num_workers,
        timeout=timeout,
    )
    judge(state, output, settings, reruns=reruns, force=force)
