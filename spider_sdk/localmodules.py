"""Modules of the user's own project, shipped as text beside the function that imports them.

A worker has the standard library and what ``runtime.packages`` installs. What an import
names is looked up without importing it: standard library and installed packages stay
imports, the project's own files travel.
"""

from __future__ import annotations

__all__ = ["LocalModules", "absolute_name"]

import ast
import importlib.machinery
import site
import sys
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

from spider_sdk.errors import UsageError

_OURS = frozenset({"spider_api", "spider_sdk", "spider_worker"})
_LIMIT_BYTES = 2 << 20

# Runs where the function runs, before it: an importer of the texts. It gives modules their
# file names and lines, so that tracebacks read as they do at home.
_IMPORTER = """
import importlib.abc, importlib.machinery, sys

class Importer(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    def find_spec(self, name, path=None, target=None):
        if name not in MODULES:
            return None
        file, package, _ = MODULES[name]
        spec = importlib.machinery.ModuleSpec(name, self, origin=file, is_package=package)
        spec.has_location = True
        return spec

    def is_package(self, name):
        return MODULES[name][1]

    def get_source(self, name):
        return MODULES[name][2]

    def get_code(self, name):
        return compile(MODULES[name][2], MODULES[name][0], "exec", dont_inherit=True)

sys.meta_path.insert(0, Importer())
"""


class LocalModules:
    """The local modules that some statements import, and those that these import.

    ``folder`` is searched first (the place of a file that is not imported itself); ``shown``
    is what messages call the file that all starts from.
    """

    def __init__(self, shown: str, folder: Path | None = None) -> None:
        self._shown = shown
        self._folder = folder
        self._modules: dict[str, tuple[str, bool, str]] = {}  # name: file, is package, text

    def follow(self, nodes: Sequence[ast.AST], package: str, importer: str | None = None) -> None:
        """Collect what ``nodes`` import. Raises UsageError for what cannot travel."""
        for line, name, optional in _imported(nodes, package):
            where = f"{importer or self._shown}:{line}"
            self._add(name, where, optional)

    def preamble(self) -> str:
        """One line of Python that makes the modules importable; empty if there are none."""
        if not self._modules:
            return ""
        size = sum(len(text.encode()) for _, _, text in self._modules.values())
        if size > _LIMIT_BYTES:
            names = ", ".join(sorted(self._modules)[:10])
            raise UsageError(
                f"{self._shown}: the project's modules that it imports ({names}, …) are {size:,} "
                f"bytes, more than {_LIMIT_BYTES:,}; import fewer, or install them on the workers"
            )
        code = f"compile({_IMPORTER!r}, '<spider modules>', 'exec')"
        return f"exec({code}, {{'MODULES': {self._modules!r}}})"

    def _add(self, name: str, where: str, optional: bool) -> None:
        parts = name.split(".")
        search: Sequence[str] | None = None
        for depth in range(1, len(parts) + 1):
            part = ".".join(parts[:depth])
            spec = self._find(part, search)
            # Not found: a name of the module's, or a package that the workers will have.
            if spec is None or (depth == 1 and not self._is_local(part, spec, where, optional)):
                return
            if part not in self._modules:
                self._ship(part, spec, where)
            search = list(spec.submodule_search_locations or ())
            if not search:
                return

    def _find(
        self, name: str, search: Sequence[str] | None
    ) -> importlib.machinery.ModuleSpec | None:
        if search is None and self._folder is not None:
            spec = importlib.machinery.PathFinder.find_spec(name, [str(self._folder)])
            if spec is not None:
                return spec
        for finder in sys.meta_path:
            spec = finder.find_spec(name, search)
            if spec is not None:
                return spec
        return None

    def _is_local(
        self, name: str, spec: importlib.machinery.ModuleSpec, where: str, optional: bool
    ) -> bool:
        if name in sys.stdlib_module_names or spec.origin in ("built-in", "frozen"):
            return False
        if name in _OURS:
            if optional:
                return False
            raise UsageError(
                f"{where}: {name} is imported, which a user function cannot: "
                "it gets a plain dict and returns plain values"
            )
        places = [spec.origin] if spec.has_location else list(spec.submodule_search_locations or ())
        return not any(place is not None and _is_installed(Path(place)) for place in places)

    def _ship(self, name: str, spec: importlib.machinery.ModuleSpec, where: str) -> None:
        package = spec.submodule_search_locations is not None
        file = name.replace(".", "/") + ("/__init__.py" if package else ".py")
        if package and not spec.has_location:  # a namespace package has no text of its own
            self._modules[name] = (file, True, "")
            return
        if spec.origin is None or not spec.origin.endswith(".py"):
            raise UsageError(
                f"{where}: the local module {name} is no Python text ({spec.origin}) and cannot "
                "travel to a worker; make it a package and name that under job.runtime.packages"
            )
        try:
            with tokenize.open(spec.origin) as opened:
                text = opened.read()
            tree = ast.parse(text)
        except (OSError, SyntaxError, ValueError) as error:
            raise UsageError(f"{where}: the local module {name} cannot be read: {error}") from None
        self._modules[name] = (file, package, text)
        self.follow([tree], name if package else name.rpartition(".")[0], file)


def absolute_name(node: ast.ImportFrom, package: str) -> str:
    """The module that a ``from`` names, as seen from a module in ``package``.

    Raises UsageError for a relative import that leads out of the package.
    """
    if not node.level:
        return node.module or ""
    parts = package.split(".") if package else []
    if node.level > len(parts):
        dots = "." * node.level
        raise UsageError(
            f"line {node.lineno}: from {dots}{node.module or ''} leads out of the package; "
            "import the module that holds the function as a part of its package"
        )
    base = parts[: len(parts) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def _imported(nodes: Sequence[ast.AST], package: str) -> Iterator[tuple[int, str, bool]]:
    """``(line, name, optional)`` of everything imported; optional inside try or TYPE_CHECKING."""
    for node in nodes:
        guarded = {
            id(part)
            for block in ast.walk(node)
            if isinstance(block, ast.Try) or (isinstance(block, ast.If) and _type_checking(block))
            for part in ast.walk(block)
        }
        for part in ast.walk(node):
            optional = id(part) in guarded
            if isinstance(part, ast.Import):
                for alias in part.names:
                    yield part.lineno, alias.name, optional
            elif isinstance(part, ast.ImportFrom):
                name = absolute_name(part, package)
                yield part.lineno, name, optional
                for alias in part.names:  # which may be modules in their turn
                    yield part.lineno, f"{name}.{alias.name}", optional


def _type_checking(node: ast.If) -> bool:
    return any(
        "TYPE_CHECKING" in (getattr(part, "id", ""), getattr(part, "attr", ""))
        for part in ast.walk(node.test)
    )


def _is_installed(path: Path) -> bool:
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    schemes = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = [sysconfig.get_path(name) for name in schemes]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    return any(path.is_relative_to(folder) for folder in folders)
