"""Who goes on with a session once the function that used it is left."""

import ast
from collections.abc import Collection, Iterator
from typing import NamedTuple

from sessionscope.check._committing import commits_at_end, decorator_commits
from sessionscope.check._dialects import keeps_postgresql_out
from sessionscope.check._entries import has_entry_points, is_called_by_others, is_never_called
from sessionscope.check._facts import STATEMENTS, Block, Scope, Use, dotted, last_name, position
from sessionscope.check._model import Because, Called, Model, contains
from sessionscope.check._ownership import CLOSING, own_name, stored_in
from sessionscope.check._reach import loops_over, reaches
from sessionscope.check._values import Value

_ENDS = CLOSING | {"rollback"}
_ENDPOINTS = frozenset({"endpoint", "dependency", "task", "command"})
_HTTP_METHODS = frozenset({"get", "post", "put", "patch", "delete", "head", "options", "dispatch"})


class Swallowed(NamedTuple):
    """An error that ends in *scope*, of a call on the session *path*."""

    scope: Scope
    path: str
    use: Use
    value: Value
    expected: bool  # where no caller is known, it is taken to matter to them
    written: bool  # a flush or a commit: the session itself refuses what comes next
    told: bool  # the function returns False for it


def goes_on(model: Model, error: Swallowed) -> Because | None:
    """Return who uses the session after the function was left as if all was well."""
    scope, path = error.scope, error.path
    commit = _block_that_commits(model, scope, path, error.use.block)
    if commit is not None:
        return Because(scope, commit, "and the block around it commits here")
    if path.startswith(own_name(scope)) and path.count(".") == 1:
        return _other_method(model, scope, path)
    if _receives(scope, path) and error.value.received:
        return _holder(model, error)
    if error.value.scoped and error.expected and "." in path and not _ends_request(model, scope):
        if is_never_called(model, scope) and not is_called_by_others(model, scope):
            return None
        if not _is_stream(model, scope):
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


def _is_dead(model: Model, scope: Scope) -> bool:
    """Return whether nobody calls the function of a program that is here as a whole."""
    return (
        is_never_called(model, scope)
        and not is_called_by_others(model, scope)
        and has_entry_points(model)
    )


def _is_stream(model: Model, scope: Scope) -> bool:
    """A generator that endpoints alone start: its end is the end of the response."""
    callers = model.callers(scope) if scope.is_generator else []
    return bool(callers) and all(_ends_request(model, called.scope) for called in callers)


# A session that the object holds.


def _other_method(model: Model, scope: Scope, path: str) -> Because | None:
    """The object keeps its session for its next method."""
    owner = stored_in(scope)
    callers = model.callers(scope)
    if owner is None or (callers and all(_ends_it(c, path) for c in callers)):
        return None
    users = {
        method.name: Because(method, use.node, f"`{method.name}` goes on with it here")
        for method in reversed(owner.children)
        for use in reversed(method.uses.get(path, []))
        if method is not scope and use.role == "method" and use.name not in _ENDS
    }
    for called in callers:
        later = _next_call(called, path, users)
        if later is not None:
            return Because(called.scope, later, f"`{called.scope.name}` goes on with it here")
    return list(users.values())[-1] if users else None


def _next_call(called: Called, path: str, users: Collection[str]) -> ast.expr | None:
    """Return the caller's next use of the object's session, itself or by another method."""
    function = called.call.node.func
    held = dotted(function.value) if isinstance(function, ast.Attribute) else None
    if held is None:
        return None
    scope, block = called.scope, called.call.block
    name = path.partition(".")[2]
    uses = [u for u in scope.uses.get(held, ()) if u.name in users]
    uses += scope.uses.get(f"{held}.{name}", ())
    for use in sorted(uses, key=lambda use: position(use.node)):
        after = _is_below(use, called) and reaches(block, use.block, held)
        if use.role == "method" and after:
            return None if _leaves(called) or use.name in _ENDS else use.node
    return None


def _ends_it(called: Called, path: str) -> bool:
    """Return whether the caller ends the session of the object before anything else."""
    here = position(called.call.node)
    if any(block.kind == "loop" for block in called.call.block.chain()):
        return False
    later = [use for use in called.scope.uses.get(path, ()) if position(use.node) > here]
    return bool(later) and later[0].name in _ENDS


# A session that the caller holds.


def _holder(model: Model, error: Swallowed) -> Because | None:
    scope = error.scope
    if _ends_request(model, scope):
        return None
    passing = list(_passing(model, scope, error.path))
    callers = model.callers(scope)
    for called, held in passing:
        later = _use_after(model, called, held, error)
        if later is not None:
            return Because(called.scope, later, f"`{called.scope.name}` goes on with it here")
    decorated = decorator_commits(model, scope)
    # Who is told that it failed, and holds no session himself, loses nothing by the rollback.
    if decorated is not None and not (error.told and not error.written and callers and not passing):
        return Because(*decorated, "and its decorator commits here")
    if callers or not error.expected or _is_dead(model, scope):
        return None
    return Because(scope, scope.function, "the caller goes on with it")


def _ends_request(model: Model, scope: Scope) -> bool:
    """An endpoint, or a method of a view class: its answer is the end of the request."""
    if scope.owner_class is not None and scope.name in _HTTP_METHODS:
        return True
    return model.in_context(scope) in _ENDPOINTS


def _passing(model: Model, scope: Scope, name: str) -> Iterator[tuple[Called, str]]:
    """Yield the calls that hand *scope* its session *name*, then those of their callers."""
    level, seen = [(scope, name)], {id(scope)}
    for _ in range(4):
        above: list[tuple[Scope, str]] = []
        for function, path in level:
            for called in model.callers(function):
                passed = model.argument_for(called.call.node, function, path)
                held = dotted(passed) if passed is not None else None
                if held is not None:
                    yield called, held
                    if id(called.scope) not in seen and _receives(called.scope, held):
                        seen.add(id(called.scope))
                        above.append((called.scope, held))
        level = above


def _receives(scope: Scope, name: str) -> bool:
    bindings = scope.bindings.get(name, [])
    return len(bindings) == 1 and bindings[0].kind == "parameter"


def _use_after(model: Model, called: Called, held: str, error: Swallowed) -> ast.expr | None:
    """Return what the caller does with a session after its call, or in the loop around it."""
    scope, block = called.scope, called.call.block
    if _leaves(called):
        return None
    loops = loops_over(scope, held, block)
    for use in _uses(model, scope, held):
        after = _is_below(use, called) and reaches(block, use.block, held)
        looped = any(loop in use.block.chain() for loop in loops)
        if not (after or looped) or contains(called.call.node, use.node):
            continue
        if error.written or not keeps_postgresql_out(model, scope, use.node, use.block):
            return None if use.name in _ENDS else use.node
    return None


def _uses(model: Model, scope: Scope, held: str) -> list[Use]:
    """Return the uses of the session *held* in order, also by who is handed it."""
    found = [use for path, use, _ in model.session_uses(scope) if path == held]
    found += [use for use in scope.uses.get(held, ()) if _hands_on(model, scope, use)]
    return sorted(found, key=lambda use: position(use.node))


def _hands_on(model: Model, scope: Scope, use: Use) -> bool:
    """A function that uses it, or an object that keeps it, gets the session."""
    if use.role != "argument" or not isinstance(use.owner, ast.Call):
        return False
    target = model.called(use.owner, scope)
    if target is None or target.kind == "class":
        return last_name(use.owner)[:1].isupper()
    return any(
        model.argument_for(use.owner, target, path) is use.node
        for path, inner, _ in model.session_uses(target)
        if inner.name in STATEMENTS
    )


def _is_below(use: Use, called: Called) -> bool:
    call = called.call.node
    return position(use.node) > (call.end_lineno or 0, call.end_col_offset or 0)


def _leaves(called: Called) -> bool:
    """Return whether the call is what its function returns."""
    return any(contains(outcome.node, called.call.node) for outcome in called.scope.returns)
