"""Session classes of the project that roll back by themselves when a statement fails."""

import ast

from sessionscope.check._facts import Scope
from sessionscope.check._model import Model

_MAKERS = ("sessionmaker", "async_sessionmaker")
_UNDO = ("rollback", "invalidate")


def recovered(model: Model) -> frozenset[str]:
    """Return the methods after whose error each session of the project has rolled back.

    The factories at the top of the modules decide: a session that came in by parameter may be
    from any of them.
    """
    methods = [
        _of_factory(model, call.node, scope)
        for scope, call in model.calls_of(_MAKERS)
        if scope.kind == "module" and model.value(call.node, scope) is not None
    ]
    return methods[0].intersection(*methods) if methods else frozenset[str]()


def _of_factory(model: Model, made: ast.Call, scope: Scope) -> frozenset[str]:
    for keyword in made.keywords:
        if keyword.arg == "class_":
            found = model.value(keyword.value, scope)
            owner = found.target if found is not None and found.kind == "class" else None
            if isinstance(owner, Scope):
                return frozenset(m.name for m in owner.children if _undoes_on_error(m))
    return frozenset[str]()


def _undoes_on_error(method: Scope) -> bool:
    """Return whether a handler of *method* calls a rollback, by that name or one with it."""
    return any(
        any(word in call.name for word in _UNDO)
        and any(block.kind == "except" for block in call.block.chain())
        for call in method.calls
    )
