"""The names that fixes write: whether a module can have them, and the import that brings them."""

import ast

import libcst as cst

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
    place = _end_of_imports(module)
    return module.with_changes(body=[*module.body[:place], line, *module.body[place:]]).bytes


def _is_imported(tree: ast.Module, name: str) -> bool:
    """Return whether the module imports *name* before any statement uses it."""
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom):
            if any(a.name == name and a.asname in {None, name} for a in statement.names):
                return True
        elif any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(statement)):
            return False
    return False


def _end_of_imports(module: cst.Module) -> int:
    """Return where the imports at the top end: what comes later may use the name at once."""
    start = 0 if module.get_docstring() is None else 1
    for place, statement in enumerate(module.body[start:], start):
        if not _is_import(statement):
            return place
    return len(module.body)


def _is_import(statement: cst.BaseStatement) -> bool:
    return isinstance(statement, cst.SimpleStatementLine) and all(
        isinstance(line, cst.Import | cst.ImportFrom) for line in statement.body
    )
