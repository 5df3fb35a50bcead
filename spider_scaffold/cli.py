"""The root of ``spider-scaffold``. Its commands are imported when they run, as ``spider``'s are."""

from __future__ import annotations

__all__ = ["cli", "main", "run"]

import importlib
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

import click

from spider_sdk.cli.main import run_program

COMMANDS: Final = {
    "openhands": (
        "spider_scaffold.openhands:openhands",
        "Generate trajectories with OpenHands, as a config says.",
    ),
    "evaluate": ("spider_scaffold.evaluate:evaluate", "Judge the patches of an output.jsonl."),
    "push": ("spider_scaffold.push:push", "Publish an output.jsonl as a data set on the Hub."),
}
"""Name: (where it is, its line in the help)."""


class ScaffoldGroup(click.Group):
    """Commands by name; the help lists them without importing any."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        return list(COMMANDS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002
        cmd_name: str,
    ) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        found = getattr(importlib.import_module(module), name)
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=ScaffoldGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="spider-distill", prog_name="spider-scaffold")
def cli() -> None:
    """Trajectories of coding agents on software tasks: generate, judge, publish.

    Exit codes: 0 done, 1 the job failed, 2 usage or config, 3 server unreachable,
    4 cancelled, 130 Ctrl-C.
    """


def main() -> NoReturn:
    """The entry point of the ``spider-scaffold`` script."""
    sys.exit(run(sys.argv[1:]))


def run(args: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    return run_program(cli, "spider-scaffold", args)


if __name__ == "__main__":
    main()
