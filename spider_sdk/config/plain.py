"""Documents as plain JSON values: checked, merged and filled in from the environment."""

from __future__ import annotations

__all__ = ["apply_overrides", "as_json", "interpolate", "parse_override"]

import math
import re
from collections.abc import Mapping
from typing import Any, Final

from spider_sdk.config.names import is_secret_key
from spider_sdk.config.positions import (
    MAX_DEPTH,
    Document,
    Path,
    dotted,
    read_yaml,
    resolve_scalar,
)
from spider_sdk.errors import ConfigError, Problem

_REFERENCE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)\}|\$\{[^}]*\}?")
_MISSING: Final = object()
_CODE: Final = frozenset({"pre_processor", "post_processor", "evaluator", "tools"})


def as_json(value: Any, problems: list[Problem], path: Path = ()) -> Any:
    """A copy of ``value`` in dicts, lists and JSON scalars; what is none becomes a problem and
    None. Tuples become lists."""
    if len(path) > MAX_DEPTH:
        return _bad(problems, path[:8], f"nested more than {MAX_DEPTH} levels deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        text = str(value)
        if any("\ud800" <= char <= "\udfff" for char in text):
            return _bad(problems, path, "text with half of a surrogate pair, which is no UTF-8")
        return text
    if isinstance(value, int):
        if -(2**63) <= value < 2**64:
            return int(value)
        return _bad(problems, path, "expected a number of at most 64 bits")
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return _bad(problems, path, f"expected a finite number, not {value}")
    if isinstance(value, Mapping):
        return _mapping(value, problems, path)
    if isinstance(value, list | tuple):
        return [as_json(item, problems, (*path, number)) for number, item in enumerate(value)]
    return _bad(problems, path, f"expected a JSON value, not a {type(value).__name__}")


def _mapping(value: Mapping[Any, Any], problems: list[Problem], path: Path) -> dict[str, Any]:
    result = {}
    for key, item in value.items():
        if isinstance(key, str) and as_json(key, problems, path) is not None:
            result[str(key)] = as_json(item, problems, (*path, str(key)))
        elif not isinstance(key, str):
            _bad(problems, path, f"expected keys that are text, not a {type(key).__name__}")
    return result


def _bad(problems: list[Problem], path: Path, message: str) -> None:
    problems.append(Problem(dotted(path), message))


def interpolate(document: Document, environ: Mapping[str, str]) -> dict[str, str]:
    """Replace every ``${NAME}`` in the document's values, in place; ``$${`` stands for ``${``.

    An unquoted value that is nothing but ``${NAME}`` takes the type that the variable's text
    has as a YAML scalar; any other stays text, and so does a key or password, which may well
    consist of digits. Python text of processors and tools
    is left alone. Returns the dotted path of each value that changed with the variable's name
    (several are joined by ``,``). What is wrong is added to ``document.problems``.
    """
    origins: dict[str, str] = {}
    document.data = _filled(document.data, (), document, environ, origins)
    return origins


def _filled(
    value: Any, path: Path, document: Document, environ: Mapping[str, str], origins: dict[str, str]
) -> Any:
    if isinstance(value, dict):
        return {
            key: item
            if _is_source(path, key)
            else _filled(item, (*path, key), document, environ, origins)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [
            _filled(item, (*path, number), document, environ, origins)
            for number, item in enumerate(value)
        ]
    if isinstance(value, str) and "${" in value:
        return _text(value, path, document, environ, origins)
    return value


def _is_source(path: Path, key: str) -> bool:
    return key == "source" and not _CODE.isdisjoint(path[1:2])


def _text(
    value: str, path: Path, document: Document, environ: Mapping[str, str], origins: dict[str, str]
) -> Any:
    names: list[str] = []
    complaints: list[str] = []

    def replacement(match: re.Match[str]) -> str:
        name = match.group(1)
        if match.group() == "$${":
            return "${"
        if name is None:
            complaints.append(
                f"{match.group()[:40]!r} is not of the form ${{NAME}}; write $${{ for a literal ${{"
            )
        elif name not in environ:
            complaints.append(
                f"the environment variable {name} is not set; set it, or write $${{{name}}} for "
                f"the literal text"
            )
        else:
            names.append(name)
            return environ[name]
        return ""

    text = _REFERENCE.sub(replacement, value)
    if any("\ud800" <= char <= "\udfff" for char in text):
        complaints.append(f"{', '.join(names)} holds bytes that are no UTF-8")
    if complaints:
        document.problems += [document.problem(path, said) for said in complaints]
        return None
    if names:
        origins[dotted(path)] = ",".join(dict.fromkeys(names))
    typed = path not in document.quoted and not is_secret_key(str(path[-1] if path else ""))
    if names and typed and value == f"${{{names[0]}}}":
        try:
            return resolve_scalar(text)
        except ValueError:
            return text  # digits too long for a number: an identifier or a key
    return text


def parse_override(text: str) -> tuple[str, Any]:
    """``job.generation.seed=1`` as ``("job.generation.seed", 1)``, the value by YAML's rules.

    Text that starts with ``[``, ``{`` or a quotation mark is read as YAML, everything else
    as one scalar, so ``: `` and ``#`` need no quotes. Raises ConfigError.
    """
    path, equals, value = text.partition("=")
    path, value = path.strip(), value.strip()
    if not equals or not path:
        message = f"expected PATH=VALUE such as job.generation.seed=1, not {text!r}"
        raise ConfigError([Problem("--set", message)])
    if value[:1] in ("[", "{", '"', "'"):
        try:
            document = read_yaml(value)
        except ConfigError as error:
            said = error.problems[0].message
            raise ConfigError([Problem(path, f"{said} (quote text that starts so)")]) from error
        if document.problems:
            raise ConfigError([Problem(path, one.message) for one in document.problems])
        return path, document.data
    try:
        return path, resolve_scalar(value)
    except ValueError as error:
        raise ConfigError([Problem(path, f"{error}, not {value[:40]}")]) from error


def apply_overrides(document: Document, overrides: Mapping[str, Any]) -> None:
    """Put ``overrides`` over the document, in place.

    Keys are dotted paths from the root or nested mappings, or both. A mapping is merged into
    the one that it meets; everything else replaces. A number in a path is a place in a list.
    Lines of what was replaced are forgotten: it no longer comes from the file.
    """
    if not isinstance(document.data, dict):
        return
    for key, value in overrides.items():
        if not isinstance(key, str) or not all(key.split(".")):
            message = f"expected a dotted path such as job.source.split, not {key!r}"
            document.problems.append(Problem("overrides", message))
            continue
        path: Path = tuple(key.split("."))
        _put(document, document.data, path, 0, as_json(value, document.problems, path))


def _put(document: Document, into: Any, path: Path, at: int, value: Any) -> None:
    """``into`` lies at ``path[:at]``; put ``value`` at ``path``."""
    step: Any = path[at]
    if isinstance(into, list):
        if not str(step).isdecimal() or len(str(step)) > 6 or int(step) >= len(into):
            message = f"expected a place in a list of {len(into)} (counted from 0), not {step!r}"
            document.problems.append(Problem(dotted(path), message))
            return
        step = int(step)
        path = (*path[:at], step, *path[at + 1 :])
    here = path[: at + 1]
    present = into.get(step, _MISSING) if isinstance(into, dict) else into[step]
    if at + 1 < len(path):
        if not isinstance(present, dict | list):
            if present is not _MISSING and present is not None:
                message = f"{dotted(here)} is a value, not a section"
                document.problems.append(Problem(dotted(path), message))
                return
            into[step] = present = {}
        _put(document, present, path, at + 1, value)
    elif isinstance(value, dict) and isinstance(present, dict):
        for key, item in value.items():
            _put(document, present, (*here, key), at + 1, item)
    else:
        into[step] = value
        _forget(document, here)


def _forget(document: Document, path: Path) -> None:
    document.overridden.add(path)
    document.quoted = {one for one in document.quoted if one[: len(path)] != path}
