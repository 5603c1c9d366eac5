"""Sessions that nobody declares: known by what the code does with them.

A name proves nothing. But ``x.add(user)`` and ``x.commit()``, or ``x.query(User).filter(...)``,
are what a session alone understands, whoever made it and wherever it comes from.
"""

import ast
import re
from collections.abc import Callable, Iterator

from sessionscope.check._facts import STATEMENTS, Scope, Use, last_name, receiver, words
from sessionscope.check._values import Value

_ENDS = frozenset({"commit", "flush", "refresh"})
_STATEMENT = frozenset({"execute", "scalar", "scalars", "exec", "stream", "stream_scalars"})
_TELLING = _STATEMENT | {"query", "get", "add", "add_all", "bulk_save_objects"}
_BUILDERS = words("select update delete insert text exists union union_all")
_QUERIES = words(
    "filter filter_by join outerjoin options get all first one one_or_none order_by count scalar "
    "with_for_update where distinct limit delete update with_entities group_by select_from"
)
_NAMED = re.compile(r"(?i)sess|db|database")
_LIBRARIES = frozenset({"sqlalchemy", "sqlmodel", "sqlalchemy_utils"})

Evaluate = Callable[[ast.expr | None, Scope], Value | None]


def session_by_use(path: str, scope: Scope, value: Evaluate) -> Value | None:
    """Return the session that *path* is by its use in *scope*, if it is one."""
    for use in scope.uses.get(path, ()):
        if use.name in _TELLING:
            break
    else:
        if not _NAMED.search(path):
            return None  # nearly all names of a program
    key = ("by use", path)
    if key not in scope.memo:
        scope.memo[key] = None  # asked again while it is looked into
        scope.memo[key] = _judge(path, scope, value)
    known = scope.memo[key]
    return known if isinstance(known, Value) else None


def _judge(path: str, scope: Scope, value: Evaluate) -> Value | None:
    uses = list(_uses(path, scope))
    names = {use.name for _, use in uses}
    if names.isdisjoint(_TELLING) or not _is_session(path, uses, names, value):
        return None
    bindings = scope.bindings.get(path, ())
    received = bool(bindings) and all(b.kind == "parameter" for b in bindings)
    root = path.partition(".")[0]
    local = any(root in s.bindings for s in scope.around() if s.kind == "function")
    is_async = _is_awaited(uses)
    # What an object or a module holds may be a registry, which each thread asks anew.
    scoped = not local or ("." in path and not is_async)
    return Value("session", is_async, received=received, scoped=scoped)


def _uses(path: str, scope: Scope) -> Iterator[tuple[Scope, Use]]:
    """Yield the method calls on *path* in *scope*, around it, and in the other methods."""
    places = {id(s): s for s in scope.around() if s.kind == "function"}
    method = scope.method()
    own = receiver(method) if method is not None else None
    if own is not None and path.startswith(f"{own}.") and method is not None and method.parent:
        places |= {id(s): s for s in method.parent.children}
    for place in places.values():
        for use in place.uses.get(path, ()):
            if use.role == "method":
                yield place, use


def _is_session(path: str, uses: list[tuple[Scope, Use]], names: set[str], value: Evaluate) -> bool:
    if names & {"add", "add_all", "bulk_save_objects"} and names & _ENDS:
        return True
    named = bool(_NAMED.search(path.rpartition(".")[2]))
    return any(_tells(scope, use, named, value) for scope, use in uses)


def _tells(scope: Scope, use: Use, named: bool, value: Evaluate) -> bool:
    """Return whether one call shows that its receiver is a session."""
    node = use.node
    if not isinstance(node, ast.Call) or not node.args:
        return False
    if use.name == "query":
        outer = use.owner.func if isinstance(use.owner, ast.Call) else None
        chained = isinstance(outer, ast.Attribute) and outer.attr in _QUERIES
        return _is_class(node.args[0]) and (chained or named)
    if use.name == "get":
        return named and len(node.args) == 2 and _is_class(node.args[0])
    # A connection executes statements too; then the name must agree.
    return use.name in _STATEMENT and named and _is_statement(node.args[0], scope, value)


def _is_class(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute) and not node.attr[:1].isupper():
        node = node.value
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return bool(name[:1].isupper()) and not name.isupper()


def _is_statement(node: ast.expr, scope: Scope, value: Evaluate, depth: int = 0) -> bool:
    """``select(User).where(...)``, here or in the line above."""
    while isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and last_name(node) not in _BUILDERS:
            node = node.func.value
            continue
        if last_name(node) not in _BUILDERS:
            return False
        found = value(node.func, scope)
        return found is not None and found.name.partition(".")[0] in _LIBRARIES
    if not isinstance(node, ast.Name) or depth > 2:
        return False
    return any(
        _is_statement(binding.value, scope, value, depth + 1)
        for binding in scope.bindings.get(node.id, ())
        if binding.kind == "value" and isinstance(binding.value, ast.expr)
    )


def _is_awaited(uses: list[tuple[Scope, Use]]) -> bool:
    """Return whether the statements are awaited, which those of a plain session never are."""
    awaited = {id(call.node) for scope, _ in uses for call in scope.calls if call.role == "await"}
    return any(id(use.node) in awaited for _, use in uses if use.name in STATEMENTS)
