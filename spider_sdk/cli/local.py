"""Commands that need no server: validate, init, config show, completion."""

from __future__ import annotations

__all__ = ["completion", "config", "init", "validate"]

import importlib.metadata
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import get_completion_class

from spider_sdk import settings
from spider_sdk.cli.options import env_option, load_config, pass_state, set_option
from spider_sdk.cli.starter import STARTER
from spider_sdk.cli.state import State, json_option
from spider_sdk.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from spider_sdk.config import AppConfig

SETTINGS = "spider.settings"


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@set_option
@env_option
@json_option
@pass_state
def validate(state: State, config: Path, sets: tuple[str, ...], env: tuple[str, ...]) -> None:
    """Check CONFIG without a server and print every problem with its line.

    Local data and required variables are checked too, as at submission.
    """
    from spider_sdk.inputs import localise
    from spider_sdk.submission import Submittable

    loaded = load_config(config, sets)
    with tempfile.TemporaryDirectory(prefix="spider-") as made:
        files = localise(loaded.document, Path(made)).files
    missing = _missing(loaded, env)
    try:
        forwarded = Submittable.build(loaded, env=env).forwarded if not missing else ()
        obstacle = None
    except ConfigError as error:
        forwarded, obstacle = (), error.message
    if state.json:
        inputs = [{"name": file.name, "bytes": file.size} for file in files]
        found = {"valid": True, "submittable": obstacle is None, "obstacle": obstacle}
        state.emit({**found, "forwarded": forwarded, "missing_env": missing, "inputs": inputs})
        return
    state.say(f"{config} is valid")
    if files:
        state.say(f"would upload: {', '.join(file.name for file in files)}")
    if forwarded:
        state.say(f"would forward, by name: {', '.join(forwarded)}")
    for name in missing:
        state.note(f"warning: {name} is not set; the job cannot be submitted without it")
    if obstacle:
        state.note(f"warning: it cannot be submitted as it is: {obstacle}")


def _missing(loaded: AppConfig, env: tuple[str, ...]) -> list[str]:
    """Variables without which the job cannot be submitted and that are not set, as ``submit``
    would find them."""
    from spider_sdk.config import check_env_names, lift_secrets

    check_env_names(env)  # before a key in the wrong place is repeated in a message
    missing = [name for name in env if not os.environ.get(name)]
    try:
        lift_secrets(loaded.document, os.environ, loaded.interpolated)
    except ConfigError as error:
        paths = [problem.path for problem in error.problems]
        missing += [path.removeprefix("env.") for path in paths if path.startswith("env.")]
    return list(dict.fromkeys(missing))


@click.command()
@click.argument("path", default="job.yaml", type=click.Path(dir_okay=False, path_type=Path))
@json_option
@pass_state
def init(state: State, path: Path) -> None:
    """Write a commented config to PATH (default: job.yaml). An existing file is kept."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(STARTER)
    except FileExistsError:
        raise UsageError(f"{path} exists; it was left as it is") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    if state.json:
        state.emit({"path": str(path)})
    state.say(f"wrote {path}; check it with: spider validate {path}")


@click.group()
def config() -> None:
    """Settings of this installation."""


@config.command()
@click.option("--origin", is_flag=True, help="Also say where each value comes from.")
@json_option
@pass_state
def show(state: State, origin: bool) -> None:
    """List the settings of every installed part; secrets are masked.

    They come from SPIDER_* variables, then from the user config, then from defaults.
    """
    shown: dict[str, settings.Origin] = {}
    for cls in _settings_classes(state):
        for line in settings.origins(cls):
            shown.setdefault(line.variable, line)
    width = max((len(name) for name in shown), default=0)
    for line in shown.values():
        if state.json:
            document = {"variable": line.variable, "value": line.value, "help": line.help}
            state.emit({**document, "origin": line.origin} if origin else document)
            continue
        where = f"  ({line.origin})" if origin else ""
        state.say(f"{line.variable:<{width}} = {line.value}{where}")
        state.say(click.style(f"    {line.help}", dim=True))
    if not state.json:
        path = settings.user_config_path()
        state.note(f"user config: {path}" + ("" if path.is_file() else " (not there)"))


def _settings_classes(state: State) -> list[type[Any]]:
    classes = []
    for entry in sorted(importlib.metadata.entry_points(group=SETTINGS), key=_order):
        try:
            classes.append(entry.load())
        except ModuleNotFoundError as error:
            state.note(f"settings of {entry.name} are left out: {error.name} is not installed")
    return classes


def _order(entry: importlib.metadata.EntryPoint) -> tuple[bool, str]:
    return entry.name != "client", entry.name


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
@pass_state
def completion(state: State, shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    bash: eval "$(spider completion bash)" in ~/.bashrc
    zsh:  eval "$(spider completion zsh)" in ~/.zshrc
    fish: spider completion fish > ~/.config/fish/completions/spider.fish
    """
    cls = get_completion_class(shell)
    if cls is None:
        raise UsageError(f"no completion for {shell}")
    script = cls(click.Group("spider"), {}, "spider", "_SPIDER_COMPLETE").source()
    if state.json:
        state.emit({"shell": shell, "script": script})
    state.say(script)
