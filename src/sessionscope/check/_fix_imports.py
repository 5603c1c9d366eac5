"""The names that fixes write: whether a module can have them, and the import that brings them."""

import ast
import itertools
import sys
from collections.abc import Sequence
from typing import TypeGuard

import libcst as cst
from libcst import matchers

from sessionscope.check._finding import Finding

# Where each name may be imported from; first the module that a fix imports it from.
_HOMES = {
    "StaticPool": ("sqlalchemy.pool", "sqlalchemy"),
    "contextmanager": ("contextlib",),
    "asynccontextmanager": ("contextlib",),
}


def needed(finding: Finding) -> str | None:
    """Return the name that the fix of *finding* writes and the module may not know."""
    match finding.code:
        case "SES304":
            return "StaticPool"
        case "SES105":
            return "asynccontextmanager" if "async with" in finding.message else "contextmanager"
        case _:
            return None


def is_taken(source: bytes, name: str) -> bool:
    """Return whether *source* means something else by *name* anywhere."""
    return any(_binds_otherwise(node, name) for node in ast.walk(ast.parse(source)))


def _binds_otherwise(node: ast.AST, name: str) -> bool:
    match node:
        case ast.Import(names=aliases):
            return any((a.asname or a.name) == name for a in aliases)
        case ast.ImportFrom(names=aliases):
            of_home = node.level == 0 and node.module in _HOMES[name]
            return any(
                (a.asname or a.name) == name and not (of_home and a.name == name) for a in aliases
            )
        case ast.Name(id=found, ctx=ast.Store() | ast.Del()) | ast.arg(arg=found):
            return found == name
        case ast.FunctionDef(name=found) | ast.AsyncFunctionDef(name=found):
            return found == name
        case ast.ClassDef(name=found):
            return found == name
        case _:
            return False


def with_import(source: bytes, name: str) -> bytes:
    """Return *source* with *name* imported, above whatever uses it."""
    if _is_imported(ast.parse(source), name):
        return source
    module = cst.parse_module(source)
    line = cst.parse_statement(f"from {_HOMES[name][0]} import {name}\n")
    body: list[cst.BaseStatement] = list(module.body)
    place = _place(body, name, 0 if module.get_docstring() is None else 1)
    body.insert(place, line)
    _set_apart(body, place)
    _set_apart(body, place + 1)
    return module.with_changes(body=body).bytes


def _is_imported(tree: ast.Module, name: str) -> bool:
    """Return whether the module imports *name* before any statement uses it."""
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom):
            if any(a.name == name and a.asname in {None, name} for a in statement.names):
                return True
        elif any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(statement)):
            return False
    return False


def _place(body: Sequence[cst.BaseStatement], name: str, start: int) -> int:
    """Return where an import of *name* stands in order among the imports, above what uses it."""
    unused = itertools.takewhile(lambda n: not _mentions(body[n], name), range(start, len(body)))
    first = next((n for n in unused if _is_import(body[n])), start)
    new = _order(cst.parse_statement(f"from {_HOMES[name][0]} import {name}\n"))
    place = first
    for n in range(first, len(body)):
        if not _is_import(body[n]):
            break
        if _order(body[n]) <= new:
            place = n + 1
    return place


def _mentions(statement: cst.BaseStatement, name: str) -> bool:
    return bool(matchers.findall(statement, matchers.Name(name)))


def _order(statement: cst.BaseStatement) -> tuple[int, bool, str]:
    """Return what imports are sorted by: the future, the standard library, others, one's own."""
    assert isinstance(statement, cst.SimpleStatementLine)
    line = statement.body[0]
    if isinstance(line, cst.ImportFrom):
        module = "" if line.module is None else cst.Module([]).code_for_node(line.module)
        return (3 if line.relative else _group(module)), True, module
    assert isinstance(line, cst.Import)
    module = cst.Module([]).code_for_node(line.names[0].name)
    return _group(module), False, module


def _group(module: str) -> int:
    top = module.partition(".")[0]
    return 0 if top == "__future__" else 1 if top in sys.stdlib_module_names else 2


def _set_apart(body: list[cst.BaseStatement], place: int) -> None:
    """Put a blank line between two groups of imports, and below the last of them."""
    if not 0 < place < len(body):
        return
    before, after = body[place - 1], body[place]
    same = _is_import(before) and _is_import(after) and _order(before)[0] == _order(after)[0]
    leading = getattr(after, "leading_lines", ())
    if not same and not leading:
        body[place] = after.with_changes(leading_lines=[cst.EmptyLine(indent=False)])


def _is_import(statement: cst.BaseStatement) -> TypeGuard[cst.SimpleStatementLine]:
    return isinstance(statement, cst.SimpleStatementLine) and all(
        isinstance(line, cst.Import | cst.ImportFrom) for line in statement.body
    )
