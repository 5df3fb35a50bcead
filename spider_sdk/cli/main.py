"""``spider``: the root of the command line.

``spider --help`` must answer at once and must work where only the client is installed, so the
root lists its commands from ``COMMANDS`` and from entry points without importing any; a
command's module is imported when the command runs. Errors become words and exit codes here
and nowhere else.
"""

from __future__ import annotations

__all__ = ["SpiderGroup", "cli", "main", "run", "run_program"]

import difflib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem, shell_complete

from spider_sdk.cli.state import State
from spider_sdk.errors import SpiderError, UsageError

COMMANDS = {
    "submit": ("spider_sdk.cli.submit:submit", "Submit a job and follow it."),
    "status": ("spider_sdk.cli.jobs:status", "Show a job as it stands."),
    "list": ("spider_sdk.cli.jobs:list_jobs", "List your jobs, newest first."),
    "logs": ("spider_sdk.cli.jobs:logs", "Print what a job's runners logged."),
    "watch": ("spider_sdk.cli.follow:watch", "Follow a job until it ends."),
    "cancel": ("spider_sdk.cli.jobs:cancel", "Stop a job; what is finished is kept."),
    "retry": ("spider_sdk.cli.follow:retry", "Run a job's missing and errored rows again."),
    "download": ("spider_sdk.cli.jobs:download", "Download a job's results."),
    "validate": ("spider_sdk.cli.local:validate", "Check a config without a server."),
    "init": ("spider_sdk.cli.local:init", "Write a commented config to start from."),
    "config": ("spider_sdk.cli.local:config", "Show settings and where they come from."),
    "completion": ("spider_sdk.cli.local:completion", "Print a shell's completion script."),
}
"""Name: (where it is, its line in the help)."""

PLUGINS = {
    "up": "Start a fleet on this machine until Ctrl-C.",
    "demo": "Run two real jobs on an embedded fleet and show them.",
    "keys": "Create, list and revoke API keys.",
    "rebuild": "Put back the jobs that a lost Redis knew.",
    "preview": "Render prompts and generate a few rows locally.",
}
"""The help of entry points that this repository ships; reading their own would import them."""

GROUP = "spider.commands"


class SpiderGroup(click.Group):
    """Commands by name, imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        plugins = [name for name in _plugins() if name not in COMMANDS]
        return [*COMMANDS, *sorted(plugins)]

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002
        cmd_name: str,
    ) -> click.Command | None:
        if cmd_name in COMMANDS:
            module, _, name = COMMANDS[cmd_name][0].partition(":")
            return _command(getattr(importlib.import_module(module), name), cmd_name)
        plugin = _plugins().get(cmd_name)
        return None if plugin is None else _command(_load(plugin), cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            close = difflib.get_close_matches(args[0], self.list_commands(ctx), 1)
            if not close:
                raise
            text = f"{error.message} Did you mean {close[0]}?"
            raise click.UsageError(text, ctx=error.ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            # Plugins import what is heavy when they run, so it may turn out to be missing then.
            plugin = _plugins().get(ctx.invoked_subcommand or "")
            if plugin is None:
                raise
            raise _missing(plugin, error) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _help(name)) for name in self.list_commands(ctx)])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        if names and not incomplete.startswith("-"):
            return [CompletionItem(name, help=_help(name)) for name in names]
        return click.Command.shell_complete(self, ctx, incomplete)


@click.group(cls=SpiderGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="spider-distill", prog_name="spider")
def cli() -> None:
    """Distillation of language models on a fleet: one YAML file in, a data set out.

    Exit codes: 0 done, 1 the job failed, 2 usage or config, 3 server unreachable,
    4 cancelled, 130 Ctrl-C (the job goes on).
    """


def main() -> NoReturn:
    """The entry point of the ``spider`` script."""
    sys.exit(run(sys.argv[1:]))


def run(args: Sequence[str]) -> int:
    """Run a command line of ``spider`` and return its exit code."""
    return run_program(cli, "spider", args)


def run_program(group: click.Group, name: str, args: Sequence[str]) -> int:
    """Run a command line of the program ``name``: errors are said, and become its exit code."""
    variable = f"_{name.replace('-', '_').upper()}_COMPLETE"
    asked = os.environ.get(variable)
    if asked:
        return shell_complete(group, {}, name, variable, asked)
    state = State()
    try:
        # Not main(), which answers a broken pipe with 1: here that means a failed job.
        with group.make_context(name, list(args), obj=state) as context:
            group.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        return state.usage(error)
    except (click.Abort, KeyboardInterrupt):
        state.note("interrupted")
        return 130
    except SpiderError as error:
        return state.fail(error)
    except BrokenPipeError:
        return _reader_left()
    return 0


def _reader_left() -> int:
    """Whoever read our output (head, less) is gone: end as SIGPIPE would have ended us."""
    # The interpreter must not flush into the closed pipe once more as it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _plugins() -> dict[str, importlib.metadata.EntryPoint]:
    found = importlib.metadata.entry_points(group=GROUP)
    return {plugin.name: plugin for plugin in found}


def _load(plugin: importlib.metadata.EntryPoint) -> Any:
    try:
        return plugin.load()
    except ModuleNotFoundError as error:
        raise _missing(plugin, error) from error


def _missing(
    plugin: importlib.metadata.EntryPoint, error: ModuleNotFoundError
) -> UsageError | ModuleNotFoundError:
    """What to tell when a plugin cannot import something: its own modules are no package."""
    missing = (error.name or str(error)).partition(".")[0]
    if missing == plugin.module.partition(".")[0]:
        return error
    return UsageError(
        f"`spider {plugin.name}` needs the package {missing}, which is not installed here; "
        f"install what it needs with: pip install 'spider-distill[{_extra(plugin)}]'"
    )


def _extra(plugin: importlib.metadata.EntryPoint) -> str:
    return plugin.extras[0] if plugin.extras else "server"


def _command(found: Any, name: str) -> click.Command:
    if not isinstance(found, click.Command):
        raise UsageError(f"the entry point {name!r} of {GROUP} is no click command")
    return found


def _help(name: str) -> str:
    if name in COMMANDS:
        return COMMANDS[name][1]
    plugin = _plugins()[name]
    return PLUGINS.get(name, f"(from {plugin.module.partition('.')[0]})")


if __name__ == "__main__":
    main()
