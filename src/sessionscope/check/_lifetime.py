"""Who goes on with a session once the function that used it is left."""

import ast

from sessionscope.check._committing import commits_at_end, decorator_commits
from sessionscope.check._facts import Block, Scope, Use, position
from sessionscope.check._model import Because, Called, Model
from sessionscope.check._ownership import CLOSING, own_name, stored_in
from sessionscope.check._values import Value

_ENDS = CLOSING | {"rollback"}
_ENDPOINTS = frozenset({"endpoint", "dependency", "task", "command"})
_HTTP_METHODS = frozenset({"get", "post", "put", "patch", "delete", "head", "options", "dispatch"})


def goes_on(
    model: Model, scope: Scope, path: str, use: Use, value: Value, *, expected: bool
) -> Because | None:
    """Return who uses the session *path* after *scope* was left as if all was well.

    Where no caller is known, an error that is to be *expected* is taken to matter to them.
    """
    commit = _block_that_commits(model, scope, path, use.block)
    if commit is not None:
        return Because(scope, commit, "and the block around it commits here")
    if path.startswith(own_name(scope)) and path.count(".") == 1:
        return _other_method(model, scope, path)
    bindings = scope.bindings.get(path, [])
    if len(bindings) == 1 and bindings[0].kind == "parameter" and value.received:
        decorated = decorator_commits(model, scope)
        if decorated is not None:
            return Because(*decorated, "and its decorator commits here")
        return _caller(model, scope, expected=expected)
    if value.scoped and expected and "." in path and not _ends_request(model, scope):
        return Because(scope, scope.function, "the rest of the request has the same session")
    return None


def _block_that_commits(model: Model, scope: Scope, path: str, block: Block) -> ast.expr | None:
    for around in block.chain():
        if around.kind == "with" and isinstance(around.node, ast.With | ast.AsyncWith):
            for item in around.node.items:
                named = isinstance(item.optional_vars, ast.Name) and item.optional_vars.id == path
                if (named or ast.unparse(item.context_expr).startswith(f"{path}.begin(")) and (
                    commits_at_end(model, scope, item.context_expr)
                ):
                    return item.context_expr
    return None


def _other_method(model: Model, scope: Scope, path: str) -> Because | None:
    """The object keeps its session for its next method."""
    owner = stored_in(scope)
    callers = model.callers(scope)
    if owner is None or (callers and all(_ends_it(c, path) for c in callers)):
        return None
    for method in owner.children:
        for use in method.uses.get(path, ()):
            if method is not scope and use.role == "method" and use.name not in CLOSING:
                return Because(method, use.node, f"`{method.name}` goes on with it here")
    return None


def _ends_it(called: Called, path: str) -> bool:
    """Return whether the caller ends the session of the object before anything else."""
    here = position(called.call.node)
    if any(block.kind == "loop" for block in called.call.block.chain()):
        return False
    later = [use for use in called.scope.uses.get(path, ()) if position(use.node) > here]
    return bool(later) and later[0].name in _ENDS


def _caller(model: Model, scope: Scope, *, expected: bool) -> Because | None:
    """The caller holds the session, and goes on with it."""
    if _ends_request(model, scope):
        return None
    callers = model.callers(scope)
    for called in callers:
        later = _use_after(model, called)
        if later is not None:
            return Because(called.scope, later, f"`{called.scope.name}` goes on with it here")
    if callers or not expected:
        return None
    return Because(scope, scope.function, "the caller goes on with it")


def _ends_request(model: Model, scope: Scope) -> bool:
    """An endpoint, or a method of a view class: its answer is the end of the request."""
    if scope.owner_class is not None and scope.name in _HTTP_METHODS:
        return True
    return model.in_context(scope) in _ENDPOINTS


def _use_after(model: Model, called: Called) -> ast.expr | None:
    """Return what the caller does with a session after its call, or in the loop around it."""
    here = position(called.call.node)
    around = {id(b) for b in called.call.block.chain() if b.kind == "loop"}
    for _, use, _ in model.session_uses(called.scope):
        looped = any(id(b) in around for b in use.block.chain())
        if use.name not in CLOSING and (position(use.node) > here or looped):
            return use.node
    return None
