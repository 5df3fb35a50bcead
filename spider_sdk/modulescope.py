"""What the top-level statements of a module bind, use and change, read from its text.

The names that a function refers to are found without running anything: Python's own symbol
tables tell a global from a local of the same name, and a statement belongs to a name when it
binds it or changes what it stands for.
"""

from __future__ import annotations

__all__ = ["ModuleScope", "Statement", "parse_module"]

import ast
import builtins
import dataclasses
import symtable
from collections.abc import Iterable, Iterator

from spider_sdk.errors import UsageError

_MODULE_NAMES = frozenset({"__name__", "__doc__", "__builtins__", "__annotations__", "__debug__"})
_PLACE_NAMES = frozenset({"__file__", "__path__", "__spec__", "__loader__", "__package__"})
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclasses.dataclass(frozen=True, eq=False)
class Statement:
    """One top-level statement.

    ``binds``: names that it sets. ``uses``: globals that it or a function in it loads.
    ``hints``: names in annotations, which may never be evaluated. ``changes``: names whose
    object it alters (``N[…] = …``, ``N.append(…)``, ``@N.register``).
    """

    node: ast.stmt
    binds: frozenset[str]
    uses: frozenset[str]
    hints: frozenset[str]
    changes: frozenset[str]

    @property
    def first_line(self) -> int:
        decorators = self.node.decorator_list if isinstance(self.node, _DEFINITIONS) else []
        return min([self.node.lineno, *(decorator.lineno for decorator in decorators)])

    @property
    def last_line(self) -> int:
        return self.node.end_lineno or self.node.lineno

    @property
    def imports(self) -> bool:
        return isinstance(self.node, ast.Import | ast.ImportFrom)

    @property
    def star(self) -> bool:
        return isinstance(self.node, ast.ImportFrom) and self.node.names[0].name == "*"


@dataclasses.dataclass(frozen=True)
class ModuleScope:
    """A module's text and its statements, in order; ``shown`` is what messages call it."""

    shown: str
    text: str
    statements: tuple[Statement, ...]

    def closure(self, name: str) -> list[Statement]:
        """The statements that ``name`` needs, directly or not, in the module's order.

        Raises UsageError where one of them could not run anywhere else.
        """
        found: dict[Statement, None] = {}
        done: set[tuple[str, bool]] = set()
        todo = [(name, True)]
        while todo:
            wanted, needed = todo.pop()
            if (wanted, needed) in done:
                continue
            done.add((wanted, needed))
            for statement in self._belonging(wanted, needed):
                if statement in found:
                    continue
                self._check(statement, wanted)
                found[statement] = None
                todo += [(used, True) for used in statement.uses]
                todo += [(hint, False) for hint in statement.hints]
        future = [one for one in self.statements if _is_future(one.node)]
        return [one for one in self.statements if one in found or one in future]

    def _belonging(self, name: str, needed: bool) -> list[Statement]:
        """The statements that bind or change a name; none for a builtin."""
        binding = [one for one in self.statements if name in one.binds and not _is_future(one.node)]
        usable = [one for one in binding if not _is_main_guard(one.node)]
        if not needed:
            usable = [one for one in usable if not _is_type_checking(one.node)]
        if not usable:
            stars = [one for one in self.statements if one.star]
            if not needed or hasattr(builtins, name) or name in _MODULE_NAMES:
                return []
            if stars and name not in _PLACE_NAMES and not binding:
                return stars
            raise UsageError(self._missing(name, binding))
        if all(one.imports for one in usable):
            return usable
        changing = [
            one
            for one in self.statements
            if name in one.changes and not _is_main_guard(one.node) and one not in usable
        ]
        return usable + changing

    def _missing(self, name: str, binding: Iterable[Statement]) -> str:
        for statement in binding:
            return (
                f"{self.shown}:{statement.first_line}: {name} is set under if __name__ == "
                "'__main__', which does not run on a worker; set it outside, or pass it in the "
                "kwargs"
            )
        if name in _PLACE_NAMES:
            return (
                f"{self.shown}: {name} is used, but a worker does not have this file; "
                "pass what it leads to in the kwargs"
            )
        return f"{self.shown}: {name} is used but not defined at the top level of the module"

    def _check(self, statement: Statement, wanted: str) -> None:
        where = f"{self.shown}:{statement.first_line}: {wanted}"
        if isinstance(statement.node, ast.With | ast.AsyncWith):
            raise UsageError(
                f"{where} is set in a with statement of the module, whose files and connections a "
                "worker does not have; set it inside a function, or pass it in the kwargs"
            )
        if "open" not in statement.uses or any("open" in one.binds for one in self.statements):
            return
        calls = (node for node in _eager(statement.node) if isinstance(node, ast.Call))
        if any(isinstance(call.func, ast.Name) and call.func.id == "open" for call in calls):
            raise UsageError(
                f"{where} is read from a file, which a worker does not have; "
                "pass what is in it in the kwargs"
            )


def parse_module(text: str, shown: str) -> ModuleScope:
    """The scope of a module's text. Raises UsageError where it is not Python."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{shown}: not valid Python: {error}") from None
    statements = tuple(_statement(node) for node in tree.body)
    return ModuleScope(shown, text, _with_registrations(statements))


def _statement(node: ast.stmt) -> Statement:
    table = symtable.symtable(ast.unparse(node), "<statement>", "exec")
    binds: set[str] = set()
    uses: set[str] = set()
    for symbol in table.get_symbols():
        if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace():
            binds.add(symbol.get_name())
        if symbol.is_referenced():
            uses.add(symbol.get_name())
    for child in table.get_children():
        uses |= _globals_of(child)
    hints = set(_annotation_names(node))
    return Statement(
        node,
        frozenset(binds),
        # The tables hold names in annotations whether or not those are ever evaluated.
        frozenset(uses - (hints - _names_outside_annotations(node))),
        frozenset(hints),
        frozenset(_changed(node)),
    )


def _globals_of(table: symtable.SymbolTable) -> set[str]:
    names = set()
    for symbol in table.get_symbols():
        in_class = table.get_type() == "class" and symbol.is_referenced()  # may fall through
        if symbol.is_global() or in_class:
            names.add(symbol.get_name())
    return names.union(*(_globals_of(child) for child in table.get_children()))


def _annotations(node: ast.AST) -> Iterator[ast.expr]:
    for part in ast.walk(node):
        if isinstance(part, ast.arg | ast.AnnAssign) and part.annotation is not None:
            yield part.annotation
        elif isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and part.returns is not None:
            yield part.returns


def _annotation_names(node: ast.AST) -> Iterator[str]:
    for annotation in _annotations(node):
        for part in ast.walk(annotation):
            if isinstance(part, ast.Name):
                yield part.id
            elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                try:
                    quoted = ast.parse(part.value, mode="eval")
                except SyntaxError:  # a Literal's or Annotated's text, not a name in quotes
                    continue
                yield from (name.id for name in ast.walk(quoted) if isinstance(name, ast.Name))


def _names_outside_annotations(node: ast.AST) -> set[str]:
    inside = {id(part) for annotation in _annotations(node) for part in ast.walk(annotation)}
    return {
        part.id for part in ast.walk(node) if isinstance(part, ast.Name) and id(part) not in inside
    }


def _changed(node: ast.stmt) -> Iterator[str]:
    """Names whose object a statement, or one inside an if, for, while or try, alters."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        targets = [node.value.func]
    elif isinstance(node, _DEFINITIONS):
        targets = [part for one in node.decorator_list for part in _attributes(one)]
    elif isinstance(node, ast.If | ast.For | ast.While | ast.Try):
        for field in ("body", "orelse", "finalbody"):
            for inner in getattr(node, field, []):
                yield from _changed(inner)
    for target in targets:
        if isinstance(target, ast.Attribute | ast.Subscript) and (root := _root(target)):
            yield root


def _attributes(decorator: ast.expr) -> list[ast.expr]:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return [called] if isinstance(called, ast.Attribute) else []


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _with_registrations(statements: tuple[Statement, ...]) -> tuple[Statement, ...]:
    """Let ``@register`` change the containers that the function ``register`` refers to."""
    containers = {
        name
        for one in statements
        if isinstance(one.node, ast.Assign | ast.AnnAssign)
        and isinstance(one.node.value, ast.Dict | ast.List | ast.Set | ast.Call)
        for name in one.binds
    }
    touched = {
        one.node.name: one.uses & containers
        for one in statements
        if isinstance(one.node, ast.FunctionDef)
    }

    def registered(one: Statement) -> Statement:
        if not isinstance(one.node, _DEFINITIONS):
            return one
        roots = [_root(decorator) for decorator in one.node.decorator_list]
        changes = one.changes.union(*(touched.get(root or "", ()) for root in roots))
        return dataclasses.replace(one, changes=changes)

    return tuple(registered(one) for one in statements)


def _eager(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a statement that run when the module does: no bodies of functions."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _eager(child)


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _is_main_guard(node: ast.stmt) -> bool:
    if not isinstance(node, ast.If) or not isinstance(node.test, ast.Compare):
        return False
    sides = [node.test.left, *node.test.comparators]
    return any(isinstance(side, ast.Name) and side.id == "__name__" for side in sides)


def _is_type_checking(node: ast.stmt) -> bool:
    if not isinstance(node, ast.If):
        return False
    test = node.test
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )
