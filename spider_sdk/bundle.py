"""User functions as text: a function with all that it refers to in its module.

``bundle_function`` reads the module's file, keeps the statements that the function needs, in
their order and on their lines (so that a traceback from a worker names the right line), and
adds the project's own modules that these import. Nothing is run. What could not work on a
worker is refused here, with the word on what to do instead.
"""

from __future__ import annotations

__all__ = ["Bundle", "bundle_function", "bundle_reference", "load_function"]

import ast
import functools
import importlib
import importlib.util
import inspect
import json
import linecache
import sys
import tokenize
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from spider_sdk.errors import UsageError
from spider_sdk.localmodules import LocalModules, absolute_name
from spider_sdk.modulescope import ModuleScope, Statement, parse_module


class Bundle(TypedDict):
    """A function on the wire: ``source`` is Python text that defines ``name``."""

    name: str
    source: str
    kwargs: dict[str, Any]


def bundle_function(
    function: Callable[..., Any], kwargs: Mapping[str, Any] | None = None
) -> Bundle:
    """A function of a module, called as ``function(row, **kwargs)`` on a worker.

    Raises UsageError for what is no plain function at the top level of a file, for names
    that lead out of the module's text, and for kwargs that are no JSON or do not fit.
    """
    name, module = _locate(function)
    checked = _checked_kwargs(kwargs)
    try:
        inspect.signature(function).bind({}, **checked)
    except TypeError as error:
        raise UsageError(f"{name} cannot be called as {name}(row, **kwargs): {error}") from None
    linecache.checkcache(module.__file__)
    try:
        text = inspect.getsource(module)
    except (OSError, TypeError) as error:
        raise UsageError(
            f"{name}: the source of {module.__name__} is not to be had: {error}"
        ) from None
    shown = Path(module.__file__ or "").name
    return _bundle(name, text, shown, checked, package=module.__package__ or "", folder=None)


def bundle_reference(reference: str, kwargs: Mapping[str, Any] | None = None) -> Bundle:
    """The function of ``path/to/file.py:name``, without importing the file.

    Raises UsageError as ``bundle_function`` does.
    """
    path, name = _split_reference(reference)
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (OSError, SyntaxError) as error:
        raise UsageError(f"{reference}: {error}") from None
    folder = path.absolute().parent
    return _bundle(name, text, path.name, _checked_kwargs(kwargs), package="", folder=folder)


def load_function(reference: str) -> Callable[..., Any]:
    """The function of ``path/to/file.py:name``, its file imported as a module of that name.

    The file's folder goes to the front of ``sys.path``, as when Python runs the file. Raises
    UsageError where there is no such file or function, or the import fails.
    """
    path, name = _split_reference(reference)
    path = path.absolute()
    known = sys.modules.get(path.stem)
    if known is None or getattr(known, "__file__", None) != str(path):
        known = _import_file(path, reference)
    function = getattr(known, name, None)
    if not callable(function):
        raise UsageError(f"{reference}: {path.name} defines no function {name}")
    return function  # type: ignore[no-any-return]


def _import_file(path: Path, reference: str) -> types.ModuleType:
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    # A file may be called as an installed module is: that one keeps its name.
    name = path.stem if path.stem not in sys.modules else f"spider_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{reference}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(
            f"{reference}: importing it raised {type(error).__name__}: {error}"
        ) from error
    return module


def _split_reference(reference: str) -> tuple[Path, str]:
    file, _, name = reference.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise UsageError(f"{reference!r}: expected path/to/file.py:function")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UsageError(f"{reference}: there is no file {path}")
    return path, name


def _locate(function: Any) -> tuple[str, types.ModuleType]:
    """The name at a module's top level under which a function is found, and the module."""
    _refuse_other_callables(function)
    name: str = function.__name__
    if name == "<lambda>":
        raise UsageError("a lambda cannot be shipped: give it a name with def, in a file")
    plain = inspect.unwrap(function)
    module = sys.modules.get(function.__module__)
    if module is None or getattr(module, "__file__", None) is None or _typed_in(plain):
        raise UsageError(
            f"{name} was defined in a notebook or an interactive session, which has no text to "
            "ship; put it in a .py file and import it from there"
        )
    if vars(module).get(name) is function:
        return name, module
    for other, value in vars(module).items():
        if value is function:
            return other, module
    qualified: str = getattr(function, "__qualname__", name)
    outer, _, _ = qualified.rpartition(".")
    if "<locals>" in qualified:
        free = plain.__code__.co_freevars if inspect.isfunction(plain) else ()
        uses = f" and uses its {', '.join(free)}" if free else ""
        raise UsageError(
            f"{name} is defined inside {outer.removesuffix('.<locals>')}{uses}; define it at the "
            "top level of its module, and pass what it needs in the kwargs"
        )
    if outer:
        raise UsageError(
            f"{name} is defined in the class {outer}; make it a function of its module"
        )
    raise UsageError(f"{name} is not what {module.__name__} has under that name now")


def _refuse_other_callables(function: Any) -> None:
    """Refuse what is not a function with a module and a name, with the word on each."""
    shown = getattr(function, "__qualname__", None) or repr(function)
    if isinstance(function, functools.partial):
        raise UsageError(f"{shown}: a partial cannot be shipped; pass its arguments in the kwargs")
    if inspect.isclass(function):
        raise UsageError(f"{shown} is a class; give a function of a row")
    if inspect.ismethod(function):
        raise UsageError(f"{shown} is a method; give a function at the top level of a module")
    if inspect.isbuiltin(function) or isinstance(function, types.MethodDescriptorType):
        raise UsageError(f"{shown} is built in and has no source; wrap it in a function of yours")
    if not callable(function):
        raise UsageError(f"{shown} is no function")
    if not isinstance(getattr(function, "__name__", None), str):
        raise UsageError(f"{shown} is an object of {type(function).__name__}; give a function")
    plain = inspect.unwrap(function)
    if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
        raise UsageError(f"{shown} yields; a processor returns one value a row")


def _typed_in(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    file = "" if code is None else code.co_filename
    return file.startswith("<") or "ipykernel" in file


def _checked_kwargs(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    given = dict(kwargs or {})
    for name, value in given.items():
        if not isinstance(name, str):
            raise UsageError(f"kwargs: {name!r} is no name")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"kwargs: {name} is no JSON: {error}") from None
    copy: dict[str, Any] = json.loads(json.dumps(given))
    return copy


def _bundle(
    name: str, text: str, shown: str, kwargs: dict[str, Any], *, package: str, folder: Path | None
) -> Bundle:
    scope = parse_module(text, shown)
    if not any(name in statement.binds for statement in scope.statements):
        raise UsageError(f"{shown} defines no {name} at its top level")
    statements = scope.closure(name)
    modules = LocalModules(shown, folder)
    modules.follow([statement.node for statement in statements], package)
    source = _assemble(scope, statements, package, modules.preamble())
    try:
        compile(source, shown, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{shown}: {name} cannot be taken out of its module: {error}") from None
    return {"name": name, "source": source, "kwargs": kwargs}


def _assemble(
    scope: ModuleScope, statements: Sequence[Statement], package: str, preamble: str
) -> str:
    """The statements on the lines they had, with the preamble where it moves none."""
    whole = _without_relative_imports(scope, package).split("\n")
    lines = [""] * len(whole)
    taken = _shared_lines(scope)
    for statement in statements:
        first, last = statement.first_line - 1, statement.last_line
        if taken.isdisjoint(range(first, last)):
            lines[first:last] = whole[first:last]
        else:  # a; b: only the text of a is wanted
            text = ast.unparse(_absolute(statement.node, package))
            lines[first] = "; ".join(part for part in (lines[first], text) if part)
    if preamble:
        # The first line that may hold a statement: after "from __future__", which must lead.
        future = [one.last_line for one in statements if _is_future(one)]
        place = max(future, default=0)
        if place < len(lines) and not lines[place]:
            lines[place] = preamble
        elif place and "#" not in lines[place - 1]:
            lines[place - 1] += f"; {preamble}"
        else:
            lines.insert(place, preamble)
    return "\n".join(lines).rstrip("\n") + "\n"


def _shared_lines(scope: ModuleScope) -> set[int]:
    """Lines, from 0, that more than one statement lies on."""
    seen: set[int] = set()
    shared: set[int] = set()
    for statement in scope.statements:
        span = set(range(statement.first_line - 1, statement.last_line))
        shared |= seen & span
        seen |= span
    return shared


def _without_relative_imports(scope: ModuleScope, package: str) -> str:
    """The text with absolute names in relative imports: the bundle is in no package."""
    # By bytes, as the columns of ast count them; from the end, so that places stay true.
    lines = [line.encode() for line in scope.text.split("\n")]
    nodes = [
        node
        for statement in scope.statements
        for node in ast.walk(statement.node)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    for node in sorted(nodes, key=lambda one: (one.lineno, one.col_offset), reverse=True):
        if package.count(".") + bool(package) < node.level:
            continue  # refused where it is needed
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
        text = ast.unparse(_absolute(node, package)).encode()
        lines[first : last + 1] = [before + text + after, *[b""] * (last - first)]
    return b"\n".join(lines).decode()


def _absolute(node: Any, package: str) -> Any:
    if isinstance(node, ast.ImportFrom) and node.level:
        return ast.ImportFrom(module=absolute_name(node, package), names=node.names, level=0)
    return node


def _is_future(statement: Statement) -> bool:
    node = statement.node
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"
