"""Who owns a session: what a function makes, keeps, gives away and closes."""

import ast
from collections.abc import Collection, Iterator
from typing import NamedTuple, cast

from sessionscope.check._behaviour import session_by_use
from sessionscope.check._facts import (
    Binding,
    Role,
    Scope,
    Use,
    last_name,
    parameters,
    receiver,
    words,
)
from sessionscope.check._model import Model
from sessionscope.check._paths import Marks
from sessionscope.check._values import Value

CLOSING = frozenset({"close", "aclose", "remove", "close_all", "invalidate"})
_HARMLESS = frozenset(
    {"add", "add_all", "expunge", "expunge_all", "expire", "begin", "get_bind", "configure"}
)
# Calls that keep what they are given, to end it later.
_KEEPERS = words(
    "callback push push_async_callback enter_context enter_async_context closing aclosing "
    "finalize register append set put setdefault setattr add_done_callback addfinalizer "
    "call_on_close addCleanup add_cleanup"
)


class Owned(NamedTuple):
    """A local name bound to a session that this function made."""

    name: str
    scope: Scope
    made: ast.Call
    binding: Binding
    value: Value


def owned(model: Model, scope: Scope) -> Iterator[Owned]:
    """Yield the sessions that *scope* makes and binds to local names."""
    taken = _parameter_names(scope)
    for name, bindings in scope.bindings.items():
        if "." in name or name in taken or name in scope.globals:
            continue
        for binding in bindings:
            made = fresh_call(model, scope, binding, name)
            if made is not None:
                value = model.session(made, scope) or session_by_use(name, scope, model.value)
                if value is not None:
                    yield Owned(name, scope, made, binding, value)


def fresh_call(model: Model, scope: Scope, binding: Binding, name: str = "") -> ast.Call | None:
    """Return the call with which *binding* makes a session, if it does.

    Who closes what an unknown function returned takes it for his own; *name* tells it.
    """
    if binding.kind != "value" or binding.place is not None:
        return None
    node = binding.value
    if isinstance(node, ast.Await):
        node = node.value
    if not isinstance(node, ast.Call):
        return None
    found = model.session(node, scope)
    if found is None and name and _closed_by_hand(model, scope, name, node):
        return node
    return node if found is not None and found.fresh and not on_connection(found) else None


def _closed_by_hand(model: Model, scope: Scope, name: str, made: ast.Call) -> bool:
    if not any(
        use.role == "method" and use.name in {"close", "aclose"} for use in scope.uses.get(name, ())
    ):
        return False
    if last_name(made) in {"pop", "get", "getattr", "next"}:
        return False  # somebody put it there
    known = model.value(made, scope)
    vague = known is None or (known.kind in {"external", "instance"} and known.target is None)
    return vague and session_by_use(name, scope, model.value) is not None


def stays_in_block(scope: Scope, name: str) -> bool:
    """Return whether *name* is assigned once, and used in that block alone."""
    bindings = scope.bindings.get(name, [])
    return (
        len(bindings) == 1
        and bindings[0].kind == "value"
        and bindings[0].annotation is None
        and bindings[0].place is None
        and all(bindings[0].block in use.block.chain() for use in scope.uses.get(name, ()))
    )


def on_connection(value: Value) -> bool:
    """Return whether a session was made on a connection whose owner is elsewhere."""
    made = value.node
    if not isinstance(made, ast.Call):
        return False
    binds = [*made.args[:1], *(k.value for k in made.keywords if k.arg in {"bind", None})]
    return any(
        "conn" in ast.unparse(bind).lower() or "get_bind" in ast.unparse(bind) for bind in binds
    )


def _parameter_names(scope: Scope) -> set[str]:
    node = scope.node
    if isinstance(node, ast.Module | ast.ClassDef):
        return set()
    return {argument.arg for argument, _ in parameters(node)}


def nested_use(scope: Scope, name: str) -> bool:
    """Return whether a function inside of *scope* uses its local *name*."""
    return any(
        root == name
        for child in scope.children
        for inner in child.within()
        for root in (path.partition(".")[0] for path in inner.uses)
        if name not in inner.bindings
    )


def marks(model: Model, session: Owned) -> Marks:
    """Return what each use does with the session."""
    scope = session.scope
    found = Marks(session.name)
    for binding in scope.bindings[session.name]:
        made = fresh_call(model, scope, binding, session.name)
        if made is not None:
            found.opened.add(id(made))
    for use in scope.uses.get(session.name, ()):
        _mark(model, scope, use, found)
    found.flags.update(_flags(scope, session.name, session.binding))
    return found


def _flags(scope: Scope, session: str, made: Binding) -> Iterator[str]:
    """Yield the names that are true where the session was made, and nowhere else."""
    for name, bindings in scope.bindings.items():
        match bindings[0].value:
            case ast.Compare(left=ast.Name(id=asked), ops=[ast.Is()]) if asked == session:
                if len(bindings) == 1:
                    yield name  # ``own = session is None``
            case _:
                pass
        values = {
            (b.value.value, b.block is made.block)
            for b in bindings
            if isinstance(b.value, ast.Constant) and isinstance(b.value.value, bool)
        }
        if len(bindings) == 2 and values == {(True, True), (False, False)}:
            yield name


def _mark(model: Model, scope: Scope, use: Use, found: Marks) -> None:
    node = id(use.node)
    match use.role:
        case "method" if use.name in CLOSING:
            found.closed.add(node)
        case "method" if use.name in {"rollback", "commit"}:
            found.idle.add(node)
        case "method" if use.name not in _HARMLESS:
            found.used.add(node)
        case "return" | "yield" | "assign":
            found.given.add(node)
        case "attribute" if use.name in CLOSING:
            found.given.add(node)
        case "element" if not isinstance(use.owner, ast.Call):
            found.given.add(node)
        case "argument" | "element" if isinstance(use.owner, ast.Call):
            _mark_argument(model, scope, use.owner, use.node, found)
        case "call":
            found.given.add(node)  # a registry that gives sessions in turn
        case "loop":
            found.used.add(node)
        case _:
            pass


def _mark_argument(
    model: Model, scope: Scope, call: ast.Call, node: ast.expr, found: Marks
) -> None:
    function = call.func
    last = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if last in _KEEPERS or goes_along(scope, call, {"return", "yield", "with"}):
        found.given.add(id(node))
    elif _closes_argument(model, scope, call, node):
        found.closed.add(id(call))
    else:
        found.used.add(id(call))


def _closes_argument(model: Model, scope: Scope, call: ast.Call, node: ast.expr) -> bool:
    target = model.called(call, scope)
    if target is None or target.kind != "function":
        return False
    for name in _parameter_names(target):
        if model.argument_for(call, target, name) is node:
            return any(
                (use.role == "method" and use.name in CLOSING) or use.role == "with"
                for use in target.uses.get(name, ())
            )
    return False


def goes_along(scope: Scope, call: ast.Call, ways: Collection[Role]) -> bool:
    """Return whether what *call* makes leaves the function, with the session that it was given.

    *ways* are the uses of its result that let it leave.
    """
    for fact in scope.calls:
        if fact.node is call:
            if fact.role in ways:
                return True
            if fact.role == "assign" and isinstance(fact.owner, ast.Assign):
                return _leaves(scope, fact.owner)
            if fact.role in {"argument", "element"} and isinstance(fact.owner, ast.Call):
                return fact.owner is not call and goes_along(scope, fact.owner, ways)
            return fact.role == "element"
    return False


def _leaves(scope: Scope, node: ast.Assign) -> bool:
    for target in node.targets:
        if not isinstance(target, ast.Name):
            return True
        for use in scope.uses.get(target.id, ()):
            if use.role in {"return", "yield", "assign", "with"}:
                return True
    return False


def stored_in(scope: Scope) -> Scope | None:
    """Return the class in whose instances the ``self.`` names of *scope* live."""
    method = scope.method()
    return method.owner_class if method is not None else None


def ancestry(model: Model, owner: Scope) -> frozenset[int]:
    """Return the class *owner* and all above it, by their identity."""
    known = owner.memo.get("ancestry")
    if not isinstance(known, frozenset):
        owner.memo["ancestry"] = frozenset({id(owner)})  # a circle adds nothing
        above = (b.target for b in model.infer.bases(owner) if isinstance(b.target, Scope))
        known = frozenset({id(owner)}).union(*(ancestry(model, base) for base in above))
        owner.memo["ancestry"] = known
    return cast("frozenset[int]", known)


def own_name(scope: Scope) -> str:
    """Return what the method around *scope* calls its object, with a dot."""
    method = scope.method()
    return f"{(receiver(method) if method is not None else None) or 'self'}."
