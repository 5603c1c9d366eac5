"""What the callers of a function do with the session that they gave it, once it has closed it."""

import ast

from sessionscope.check._facts import CallFact, Scope, Use, dotted, position, words
from sessionscope.check._model import Because, Called, Model
from sessionscope.check._ownership import CLOSING

_WRITES = words("add add_all delete merge flush bulk_save_objects bulk_insert_mappings")
_ENTRIES = frozenset({"endpoint", "dependency", "task", "command"})
_UNKNOWN = "whoever called it goes on with it"


def goes_on_closed(
    model: Model, scope: Scope, path: str, *, saved: bool, depth: int = 0
) -> Because | None:
    """Return who needs the session that *scope* received as *path* and has closed.

    Where it was *saved*, committed before, another statement does no harm by itself: a new
    transaction begins. Who used the session before may still hold its objects.
    """
    callers = model.callers(scope)
    if not callers or depth > 3:
        return Because(scope, scope.function, _UNKNOWN)
    for called in callers:
        argument = model.argument_for(called.call.node, scope, path)
        name = dotted(argument) if argument is not None else None
        if name is None:
            continue  # made for this call alone
        found = _in_caller(called, name, saved=saved)
        if found is None and _hands_on(model, called.scope, name):
            found = goes_on_closed(model, called.scope, name, saved=saved, depth=depth + 1)
        if found is not None:
            return found
    return None


def _in_caller(called: Called, name: str, *, saved: bool) -> Because | None:
    scope, call = called
    here = position(call.node)
    loops = {id(block) for block in call.block.chain() if block.kind == "loop"}
    uses = [use for use in scope.uses.get(name, ()) if _is_use(use, call)]
    before = [use for use in uses if position(use.node) < here]
    later = [
        use
        for use in uses
        if (position(use.node) > here or any(id(b) in loops for b in use.block.chain()))
        and not (saved and use.name in {"commit", "rollback"})
        and not any(block.kind == "except" for block in use.block.chain())
    ]
    if later and (before or not saved):
        return Because(scope, later[0].node, f"`{scope.name}` goes on with it here")
    ended = max((position(use.node) for use in before if use.name == "commit"), default=(0, 0))
    lost = [use for use in before if use.name in _WRITES and position(use.node) > ended]
    if lost and not saved:
        return Because(scope, lost[-1].node, f"what `{scope.name}` writes here is rolled back")
    return None


def _is_use(use: Use, call: CallFact) -> bool:
    if use.role == "argument":
        return use.owner is not call.node
    return use.role == "method" and use.name not in CLOSING


def _hands_on(model: Model, scope: Scope, name: str) -> bool:
    """Return whether *scope* has the session from a caller of its own."""
    bindings = scope.bindings.get(name, ())
    return (
        len(bindings) == 1
        and bindings[0].kind == "parameter"
        and model.in_context(scope) not in _ENTRIES
    )


def returns_expired(scope: Scope, path: str) -> bool:
    """Return whether *scope* returns an object that its last commit has expired."""
    added = {
        argument.id
        for use in scope.uses.get(path, ())
        if use.name in {"add", "merge"} and isinstance(use.node, ast.Call)
        for argument in use.node.args
        if isinstance(argument, ast.Name)
    }
    names = [use.name for use in scope.uses.get(path, ()) if use.name in {"commit", "refresh"}]
    return names[-1:] == ["commit"] and any(
        isinstance(outcome.value, ast.Name) and outcome.value.id in added
        for outcome in scope.returns
    )
