"""Reading YAML so that every value keeps its line, and means what it says.

Scalars follow YAML 1.2's core schema: ``5e-5`` is a number, ``on`` and ``yes`` are text,
``010`` is ten, ``1:30`` and dates are text. PyYAML's own loaders follow YAML 1.1, in which
each of these means something else.
"""

from __future__ import annotations

__all__ = ["MAX_DEPTH", "Document", "Path", "dotted", "read_yaml", "resolve_scalar"]

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, Final

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from spider_sdk.errors import ConfigError, Problem

Path = tuple[str | int, ...]

MAX_DEPTH: Final = 64
_MAX_VALUES: Final = 100_000  # aliases multiply: a few lines can mean billions of values

_NULL: Final = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL: Final = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", re.ASCII)
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_PLAIN = "spider:plain"
_CORE = "tag:yaml.org,2002:"


@dataclasses.dataclass
class Document:
    """What a file says. ``lines`` maps a value's path to the line (from 1) of its key or list
    item; ``quoted`` holds the paths of scalars that are text whatever they look like, and
    ``overridden`` those of values that no longer come from the file."""

    data: Any
    file: str | None = None
    lines: dict[Path, int] = dataclasses.field(default_factory=dict)
    quoted: set[Path] = dataclasses.field(default_factory=set)
    overridden: set[Path] = dataclasses.field(default_factory=set)
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def line(self, path: Path) -> int | None:
        """The line of ``path``, or of the nearest section around it that has one; None where
        the value does not come from a file."""
        if any(path[:end] in self.overridden for end in range(1, len(path) + 1)):
            return None
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None

    def problem(self, path: Path, message: str) -> Problem:
        """``message`` about the value at ``path``, with its file and line where it has them."""
        line = self.line(path)
        return Problem(dotted(path), message, line, None if line is None else self.file)


def dotted(path: Path) -> str:
    """``job.source.split``; ``(root)`` for the whole document."""
    return ".".join(map(str, path)) or "(root)"


def resolve_scalar(text: str) -> str | int | float | bool | None:
    """What an unquoted scalar means. Raises ValueError for a number that JSON cannot carry."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        if len(text) > 40 or not -(2**63) <= (whole := int(text, base)) < 2**64:
            raise ValueError("expected a number of at most 64 bits")
        return whole
    if _INFINITE.fullmatch(text):
        raise ValueError("expected a finite number")
    if _FLOAT.fullmatch(text):
        number = float(text)
        if not math.isfinite(number):
            raise ValueError("expected a finite number")
        return number
    return text


class _Composer(Reader, Scanner, Parser, Composer, BaseResolver):
    """YAML text to nodes, plain scalars tagged as such and resolved by nobody."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)


_Composer.add_implicit_resolver(_PLAIN, re.compile(""), None)


def read_yaml(text: str, file: str | None = None) -> Document:
    """Read one YAML document. What can be read on is collected in ``problems``; text that is no
    YAML at all raises ConfigError."""
    document = Document(None, file)
    try:
        node = _Composer(text).get_single_node()
        if node is not None:
            document.data = _Builder(document).value(node, (), ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(str(part) for part in (error.context, error.problem) if part)
        raise ConfigError(
            [
                Problem(
                    "(file)",
                    f"no valid YAML: {said}",
                    None if mark is None else mark.line + 1,
                    file,
                )
            ]
        ) from error
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ConfigError([Problem("(file)", f"no valid YAML: {said}", None, file)]) from error
    except RecursionError:
        raise ConfigError([Problem("(file)", _too_deep(), None, file)]) from None
    return document


def _too_deep() -> str:
    return f"nested more than {MAX_DEPTH} levels deep"


class _Builder:
    """Nodes to plain values, with their lines."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._values = 0

    def value(self, node: Node, path: Path, above: tuple[Node, ...]) -> Any:
        self._count(node, 1)
        self._document.lines.setdefault(path, _line(node))
        if any(node is one for one in above):
            return self._problem(node, path, "an alias that contains itself")
        if len(above) > MAX_DEPTH:
            return self._problem(node, path, _too_deep())
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        if isinstance(node, SequenceNode):
            if node.tag not in (_CORE + "seq", "!"):
                return self._problem(node, path, f"the tag {node.tag} is not supported")
            return [
                self.value(item, (*path, number), (*above, node))
                for number, item in enumerate(node.value)
            ]
        return self._mapping(node, path, above)

    def _scalar(self, node: ScalarNode, path: Path) -> Any:
        if node.tag not in (_PLAIN, _CORE + "null", _CORE + "bool", _CORE + "int", _CORE + "float"):
            if node.tag not in (_CORE + "str", "!"):
                return self._problem(node, path, f"the tag {node.tag} is not supported")
            self._document.quoted.add(path)
            return node.value
        try:
            return resolve_scalar(node.value)
        except ValueError as error:
            return self._problem(node, path, f"{error}, not {node.value[:40]}")

    def _mapping(self, node: Node, path: Path, above: tuple[Node, ...]) -> dict[str, Any]:
        if not isinstance(node, MappingNode) or node.tag not in (_CORE + "map", "!"):
            self._problem(node, path, f"the tag {node.tag} is not supported")
            return {}
        first: dict[str, int] = {}
        own: dict[str, tuple[Node, Node]] = {}
        merged: dict[str, tuple[Node, Node]] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                self._problem(key, path, "expected a key that is a word, not a list or mapping")
            elif key.tag == _PLAIN and key.value == "<<":
                for name, pair in self._merge(value, path, above):
                    merged.setdefault(name, pair)
            elif key.value in first:
                self._problem(
                    key, (*path, key.value), f"given twice, first in line {first[key.value]}"
                )
            else:
                first[key.value] = _line(key)
                own[key.value] = (key, value)
        result = {}
        for name, (key, value) in {**merged, **own}.items():
            self._document.lines[(*path, name)] = _line(key)
            result[name] = self.value(value, (*path, name), (*above, node))
        return result

    def _merge(
        self, node: Node, path: Path, above: tuple[Node, ...]
    ) -> Iterator[tuple[str, tuple[Node, Node]]]:
        """The keys that ``<<`` takes from one mapping or several, the first one's first."""
        if isinstance(node, SequenceNode) and len(above) <= MAX_DEPTH:
            self._count(node, 1 + len(node.value))
            for item in node.value:
                yield from self._merge(item, path, (*above, node))
        elif isinstance(node, MappingNode) and len(above) <= MAX_DEPTH:
            self._count(node, 1 + len(node.value))
            for key, value in node.value:
                if isinstance(key, ScalarNode) and key.value == "<<":
                    yield from self._merge(value, path, (*above, node))
                elif isinstance(key, ScalarNode):
                    yield key.value, (key, value)
        else:
            self._problem(node, (*path, "<<"), "expected a mapping to merge, or a list of them")

    def _count(self, node: Node, values: int) -> None:
        self._values += values
        if self._values > _MAX_VALUES:
            message = f"the document means more than {_MAX_VALUES} values (aliases count each time)"
            raise ConfigError([Problem("(file)", message, _line(node), self._document.file)])

    def _problem(self, node: Node, path: Path, message: str) -> None:
        self._document.problems.append(
            Problem(dotted(path), message, _line(node), self._document.file)
        )


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1
