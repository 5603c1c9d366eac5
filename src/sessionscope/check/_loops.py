"""Whose event loop a coroutine runs on."""

import ast

from sessionscope.check._committing import is_decorated
from sessionscope.check._facts import Scope, last_name, words
from sessionscope.check._model import Called, Model

_RUNNERS = frozenset({"run", "run_until_complete"})
# What shares a loop with others.
_SHARE = words(
    "gather create_task ensure_future start_soon TaskGroup create_task_group as_completed wait "
    "run_coroutine_threadsafe serve serve_forever start_server create_server run_forever "
    "start_polling run_polling"
)


def has_loop_to_itself(model: Model, function: Scope, depth: int = 0) -> bool:
    """Return whether each run of *function* is all that its event loop has to do.

    ``asyncio.run(main())`` starts such a loop, and what ``main()`` awaits runs on it.
    """
    if depth > 4 or any(call.name in _SHARE for call in function.calls):
        return False
    if any(_runs_it(model, decorator, function) for decorator in function.decorators):
        return True
    callers = model.callers(function)
    return bool(callers) and all(
        _is_run(called)
        or (called.call.role == "await" and has_loop_to_itself(model, called.scope, depth + 1))
        for called in callers
    )


def _is_run(called: Called) -> bool:
    owner = called.call.owner
    return (
        not called.scope.is_async and isinstance(owner, ast.Call) and last_name(owner) in _RUNNERS
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
