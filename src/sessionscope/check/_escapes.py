"""How a session leaves its flow: as an argument, in a closure, inside an object."""

import ast
from collections.abc import Iterator
from typing import NamedTuple

from sessionscope.check._facts import Scope, receiver
from sessionscope.check._model import Model
from sessionscope.check._values import Value


class Escape(NamedTuple):
    """A session that goes along, and the expression by which it does."""

    value: Value
    node: ast.expr
    scope: Scope
    shown: str


def escapes(model: Model, nodes: list[ast.expr], scope: Scope) -> Iterator[Escape]:
    """Yield the sessions that the expressions *nodes* take along."""
    for node in nodes:
        yield from _escapes(model, node, scope)


def _escapes(model: Model, node: ast.expr, scope: Scope) -> Iterator[Escape]:
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        yield from escapes(model, node.elts, scope)
        return
    if isinstance(node, ast.Dict):
        yield from escapes(model, node.values, scope)
        return
    if isinstance(node, ast.Starred):
        yield from _escapes(model, node.value, scope)
        return
    value = model.value(node, scope)
    if value is None:
        return
    if value.kind == "session":
        # What a registry gives is another session in another thread.
        if not value.scoped and not is_made_anew(node, value):
            yield Escape(value, node, scope, ast.unparse(node))
    elif value.kind == "function":
        yield from _of_callable(model, node, value, scope)
    elif value.kind == "instance":
        yield from _of_instance(model, node, value, scope)


def is_made_anew(node: ast.expr, value: Value) -> bool:
    """Return whether each run of *node* makes a session of its own, as ``Maker()`` does."""
    return value.fresh and not isinstance(node, ast.Name)


def _of_callable(model: Model, node: ast.expr, value: Value, scope: Scope) -> Iterator[Escape]:
    if isinstance(node, ast.Call):  # partial(function, session)
        yield from escapes(model, [*node.args[1:], *(k.value for k in node.keywords)], scope)
    target = value.target
    if isinstance(target, Scope):
        found = captured(model, target, bound=value.bound is not None)
        if found is not None:
            yield Escape(found.value, node, scope, found.shown)


def _of_instance(model: Model, node: ast.expr, value: Value, scope: Scope) -> Iterator[Escape]:
    """An object that was made with a session holds it."""
    made = value.node
    if isinstance(made, ast.Call) and value.scope is not None:
        for argument in (*made.args, *(k.value for k in made.keywords)):
            held = model.session(argument, value.scope)
            if held is not None and held.kind == "session" and not held.scoped:
                shown = f"{ast.unparse(node)}, which holds {ast.unparse(argument)}"
                yield Escape(held, node, scope, shown)


def captured(model: Model, function: Scope, *, bound: bool = False) -> Escape | None:
    """Return a session that *function* uses without having got it as an argument."""
    own = receiver(function) if bound else None
    for path, uses in function.uses.items():
        root = path.partition(".")[0]
        if root in function.bindings and root != own:
            continue
        for use in uses:
            node = use.node
            if use.role == "method" and isinstance(node, ast.Call):
                node = node.func.value if isinstance(node.func, ast.Attribute) else node
            elif use.role not in {"argument", "element", "with"}:
                continue
            found = model.session(node, function)
            if found is None or found.kind != "session" or found.fresh or found.scoped:
                continue
            if root not in function.module.scope.bindings or root == own:
                return Escape(found, node, function, path)
    return None
