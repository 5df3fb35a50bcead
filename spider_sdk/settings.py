"""Settings of a deployment: SPIDER_* variables over a user config file over defaults.

Each package declares its settings once, as a frozen dataclass whose fields carry
``setting(...)``; ``load`` reads them and ``origins`` says where each value came from, for
``spider config show --origin``. The user config is TOML at ``SPIDER_CONFIG`` or
``$XDG_CONFIG_HOME/spider/config.toml``, its keys the variables' names in lower case without
``SPIDER_`` (``redis_url = "redis://…"``). This module declares the client's.
"""

from __future__ import annotations

__all__ = ["ClientSettings", "Origin", "load", "origins", "setting", "user_config_path"]

import dataclasses
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from spider_sdk.errors import ConfigError, Problem

S = TypeVar("S")

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


def setting(default: Any, help: str, *, env: str | None = None, secret: bool = False) -> Any:
    """A field of a settings class. ``env`` overrides the variable's name, which is
    otherwise ``SPIDER_`` and the field's name in upper case; a ``secret`` is shown masked."""
    metadata = {"help": help, "env": env, "secret": secret}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Origin:
    """One line of ``spider config show --origin``."""

    variable: str
    value: str
    origin: str  #: ``default``, ``environment`` or the user config's path
    help: str


@dataclasses.dataclass(frozen=True)
class ClientSettings:
    """What the SDK and the CLI read."""

    base_url: str = setting("http://127.0.0.1:9000", "Where the Spider API is.")
    api_key: str | None = setting(None, "The key to show the API.", secret=True)


def user_config_path(env: Mapping[str, str] | None = None) -> Path:
    env = os.environ if env is None else env
    if env.get("SPIDER_CONFIG"):
        return Path(env["SPIDER_CONFIG"])
    base = env.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "spider" / "config.toml"


def load(cls: type[S], env: Mapping[str, str] | None = None) -> S:
    """An instance of a settings class. Raises ConfigError naming every bad value.

    An empty variable counts as not set.
    """
    values, problems = _read(cls, env)
    if problems:
        raise ConfigError(problems)
    return cls(**{name: value for name, (value, _) in values.items()})


def origins(cls: type[Any], env: Mapping[str, str] | None = None) -> list[Origin]:
    """Where each setting of ``cls`` comes from."""
    values, problems = _read(cls, env)
    if problems:
        raise ConfigError(problems)
    lines = []
    for field in dataclasses.fields(cls):
        value, origin = values.get(field.name, (field.default, "default"))
        shown = "" if value is None else str(value)
        if field.metadata["secret"] and shown:
            shown = shown[:6] + "…"
        shown = re.sub(r"://[^@/]*@", "://…@", shown)  # a password in a URL
        lines.append(Origin(_variable(field), shown, origin, field.metadata["help"]))
    return lines


def _variable(field: dataclasses.Field[Any]) -> str:
    return field.metadata["env"] or f"SPIDER_{field.name.upper()}"


def _read(
    cls: type[Any], env: Mapping[str, str] | None
) -> tuple[dict[str, tuple[Any, str]], list[Problem]]:
    env = os.environ if env is None else env
    path = user_config_path(env)
    user: dict[str, Any] = {}
    problems: list[Problem] = []
    if path.is_file():
        try:
            user = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, OSError) as error:
            problems.append(Problem(path="(file)", message=str(error), file=str(path)))
    hints = typing.get_type_hints(cls)
    values: dict[str, tuple[Any, str]] = {}
    for field in dataclasses.fields(cls):
        variable = _variable(field)
        key = variable.removeprefix("SPIDER_").lower()
        if env.get(variable):
            raw, origin = env[variable], "environment"
        elif key in user:
            raw, origin = str(user[key]), str(path)
        else:
            continue
        try:
            values[field.name] = (_parse(raw, hints[field.name]), origin)
        except ValueError as error:
            where = None if origin == "environment" else origin
            problems.append(Problem(path=variable, message=f"{error}, not {raw!r}", file=where))
    return values, problems


def _parse(raw: str, kind: Any) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
    if kind is bool:
        if raw.lower() in _TRUE:
            return True
        if raw.lower() in _FALSE:
            return False
        raise ValueError("expected true or false")
    if kind in (int, float):
        try:
            return kind(raw)
        except ValueError:
            raise ValueError(
                f"expected {'a whole number' if kind is int else 'a number'}"
            ) from None
    if kind is Path:
        return Path(raw).expanduser()
    return raw
