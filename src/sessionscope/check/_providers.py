"""What the checker believes: what makes sessions, what provides, owns and receives them."""

import ast
from collections.abc import Iterator

from sessionscope.check._facts import Scope
from sessionscope.check._model import Model
from sessionscope.check._values import Value

_MAKERS = {"factory": "factory", "registry": "registry", "engine": "engine"}


def describe(model: Model) -> Iterator[str]:
    """Yield one line per factory, provider, owner and receiver, in the order of the files."""
    for module in sorted(model.modules, key=lambda m: m.path):
        lines = {line for scope in module.scopes for line in _of_scope(model, scope)}
        for number, text in sorted(lines):
            yield f"{module.path}:{number}: {text}"


def _of_scope(model: Model, scope: Scope) -> Iterator[tuple[int, str]]:
    if scope.kind != "function":
        yield from _made(model, scope)
        return
    node = scope.function
    if node is None:
        return
    role = _role(model, scope)
    if role:
        yield node.lineno, f"{role} {scope.qualname}"


def _made(model: Model, scope: Scope) -> Iterator[tuple[int, str]]:
    for name, bindings in scope.bindings.items():
        for binding in bindings:
            if binding.kind == "value" and isinstance(binding.value, ast.Call):
                value = model.value(binding.value, scope)
                kind = _MAKERS.get(value.kind) if value is not None else None
                if kind and value is not None:
                    yield binding.line, f"{_colour(value)} {kind} {name}"


def _role(model: Model, scope: Scope) -> str | None:
    made = model.infer.result(scope)
    given = made.inner if made is not None and made.kind in {"generator", "manager"} else made
    if made is not None and given is not None and given.kind == "session":
        how = {"generator": "generator", "manager": "context manager"}.get(made.kind, "function")
        if made is not given or made.fresh:
            return f"{_colour(given)} provider ({how})"
    uses = model.session_uses(scope)
    if any(
        model.session(call.node, scope) is not None and _is_fresh(model, call.node, scope)
        for call in scope.calls
    ):
        return "owner"
    return "receiver" if any(value.received for _, _, value in uses) else None


def _is_fresh(model: Model, node: ast.Call, scope: Scope) -> bool:
    value = model.session(node, scope)
    return value is not None and value.fresh


def _colour(value: Value) -> str:
    return "async" if value.is_async else "sync"
