"""Mapped objects: which names hold them, and what a commit does to them."""

import ast
from collections.abc import Iterator

from sessionscope.check._facts import Binding, Scope
from sessionscope.check._model import Model
from sessionscope.check._values import Value

_LOADS = frozenset({"get", "get_one", "merge"})
_ONE = frozenset({"first", "one", "one_or_none", "scalar_one", "scalar_one_or_none", "scalar"})


def expire_option(value: Value | None) -> bool | None:
    """Return the ``expire_on_commit`` of the factory that made *value*; None if unknown."""
    maker = value.bound if value is not None else None
    if maker is None:
        return None
    made = maker.node if maker.kind == "factory" else None
    if not isinstance(made, ast.Call):
        return None
    for keyword in made.keywords:
        if keyword.arg is None:
            return None
        if keyword.arg == "expire_on_commit":
            constant = keyword.value
            return constant.value is not False if isinstance(constant, ast.Constant) else None
    return True


def session_of(model: Model, scope: Scope, node: ast.expr) -> Value | None:
    """Return the session that entering or calling *node* gives."""
    found = model.value(node, scope)
    return model.infer.entered(found) if found is not None else None


def expires(model: Model, scope: Scope, node: ast.With | ast.AsyncWith, name: str) -> bool:
    """Return whether a commit expires the objects of the session *name* of this block."""
    for item in node.items:
        if isinstance(item.optional_vars, ast.Name) and item.optional_vars.id == name:
            return expire_option(session_of(model, scope, item.context_expr)) is True
    return False


def loaded_from(model: Model, scope: Scope, block: ast.AST, name: str) -> Iterator[str]:
    """Yield the names bound inside *block* to objects of the session *name*."""
    first, last = getattr(block, "lineno", 0), getattr(block, "end_lineno", 0)
    added = {
        argument.id
        for use in scope.uses.get(name, ())
        if use.role == "method" and use.name == "add" and isinstance(use.node, ast.Call)
        for argument in use.node.args
        if isinstance(argument, ast.Name) and first <= use.node.lineno <= last
    }
    for bound, bindings in scope.bindings.items():
        inside = [b for b in bindings if first <= b.line <= last and b.kind == "value"]
        if inside and (bound in added or any(loads_object(b, name) for b in inside)):
            yield bound


def loads_object(binding: Binding, session: str) -> bool:
    """Return whether *binding* binds one mapped object loaded through *session*."""
    node = binding.value
    if isinstance(node, ast.Await):
        node = node.value
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    text = ast.unparse(node.func)
    if not text.startswith(f"{session}.") and f"({session}." not in text:
        return False
    if node.func.attr in _LOADS and text == f"{session}.{node.func.attr}":
        return True
    return node.func.attr in _ONE and _selects_entity(node)


def _selects_entity(node: ast.Call) -> bool:
    """``query(User)`` and ``select(User)`` give objects; ``query(User.id)`` gives rows."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            function = call.func
            name = (
                function.attr
                if isinstance(function, ast.Attribute)
                else getattr(function, "id", "")
            )
            if name in {"query", "select"}:
                return (
                    len(call.args) == 1
                    and isinstance(call.args[0], ast.Name)
                    and call.args[0].id[:1].isupper()
                )
    return False
