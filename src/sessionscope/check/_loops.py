"""Whose event loop a coroutine runs on, and whether others are waiting there."""

import ast

from sessionscope.check._committing import is_decorated
from sessionscope.check._facts import CallFact, Scope, last_name, position, words
from sessionscope.check._model import Called, Model
from sessionscope.check._tasks import is_awaited

_RUNNERS = frozenset({"run", "run_until_complete", "run_sync"})
# What shares a loop with others: what stays on it, and what is over when it was awaited.
_SERVERS = words(
    "run_coroutine_threadsafe serve serve_forever start_server create_server run_forever "
    "start_polling run_polling"
)
_TASKS = frozenset({"create_task", "ensure_future", "start_soon"})
_GROUPS = words("gather TaskGroup create_task_group as_completed wait")
_SHARE = _SERVERS | _TASKS | _GROUPS
_END = (1 << 30, 0)


def has_loop_to_itself(
    model: Model, function: Scope, place: tuple[int, int] = _END, depth: int = 0
) -> bool:
    """Return whether *function*, up to *place*, is all that its event loop has to do.

    ``asyncio.run(main())`` starts such a loop, and what ``main()`` awaits runs on it until a task
    or a server is started.
    """
    if depth > 4 or _shares(model, function, place):
        return False
    if any(_runs_it(model, decorator, function) for decorator in function.decorators):
        return True
    callers = model.callers(function)
    handed = _handed(model, function)
    return (
        bool(callers or handed)
        and all(_is_in_runner(scope, node) for scope, node in handed)
        and all(
            _is_run(called)
            or (
                called.call.role == "await"
                and not _in_loop_that_shares(model, called)
                and has_loop_to_itself(model, called.scope, position(called.call.node), depth + 1)
            )
            for called in callers
        )
    )


def _shares(model: Model, function: Scope, place: tuple[int, int]) -> bool:
    """Return whether *function* starts tasks or servers before *place*, by others too."""
    return any(
        position(call.node) < place
        and (
            call.name in _SHARE
            or (call.role == "await" and _leaves_others(model, function, call.node, 0))
        )
        for call in function.calls
    )


def _leaves_others(model: Model, function: Scope, node: ast.Call, depth: int) -> bool:
    """Return whether what *node* calls leaves tasks or servers on the loop."""
    target = model.called(node, function) if depth < 4 else None
    if target is None or target.kind != "function":
        return False
    key = ("leaves others", depth)  # of which the deepest know less
    if key not in target.memo:
        target.memo[key] = any(
            call.name in _SERVERS
            or (call.name in _TASKS and call.role != "return" and not _is_over(target, call))
            or (call.role == "await" and _leaves_others(model, target, call.node, depth + 1))
            for call in target.calls
        )
    return bool(target.memo[key])


def _is_over(scope: Scope, task: CallFact) -> bool:
    return task.role == "await" or is_awaited(scope, task)


def _in_loop_that_shares(model: Model, called: Called) -> bool:
    """What a loop starts in one turn is there in the next."""
    return any(block.kind == "loop" for block in called.call.block.chain()) and _shares(
        model, called.scope, _END
    )


def _is_run(called: Called) -> bool:
    owner = called.call.owner
    return (
        not called.scope.is_async and isinstance(owner, ast.Call) and last_name(owner) in _RUNNERS
    )


def _handed(model: Model, function: Scope) -> list[tuple[Scope, ast.expr]]:
    """Return where *function* itself is handed on, as in ``loop.run_sync(main)``."""
    found: list[tuple[Scope, ast.expr]] = []
    for scope, node in model.handed.get(function.name, ()):
        value = model.value(node, scope)
        method = scope.method()
        same = method is not None and method.owner_class is function.owner_class is not None
        if value.target is function if value is not None else same:
            found.append((scope, node))
    return found


def _is_in_runner(scope: Scope, node: ast.expr) -> bool:
    first = [call.node for call in scope.calls if call.node.args and call.node.args[0] is node]
    partial = [call for call in first if last_name(call) == "partial"]
    runs = [call for call in scope.calls if call.name in _RUNNERS and call.node.args]
    return not scope.is_async and any(
        call.node in first or call.node.args[0] in partial for call in runs
    )


def _runs_it(model: Model, decorator: ast.expr, function: Scope) -> bool:
    """A decorator of the project that runs each call of *function* in a loop of its own."""
    plain = decorator.func if isinstance(decorator, ast.Call) else decorator
    found = model.value(plain, function.parent or function)
    target = found.target if found is not None and found.kind == "function" else None
    return isinstance(target, Scope) and any(
        call.name in _RUNNERS
        and any(
            isinstance(argument, ast.Call) and is_decorated(argument.func, wrapper, target)
            for argument in call.node.args
        )
        for wrapper in target.within()
        for call in wrapper.calls
    )
