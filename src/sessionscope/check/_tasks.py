"""What becomes of a task that a coroutine starts: who awaits it, here or elsewhere."""

import ast
from collections.abc import Iterator

from sessionscope.check._facts import CallFact, Scope, Use, dotted, last_name
from sessionscope.check._model import dotted_root
from sessionscope.check._ownership import own_name

SEVERAL = frozenset({"gather", "wait", "as_completed"})
_TAKES = frozenset({"values", "items", "pop", "popitem", "get"})  # out of a dict or list of tasks
_WAITED_BY = SEVERAL | {"wait_for", "shield", "append", "run_until_complete"}


def names(task: CallFact) -> list[str]:
    targets = task.owner.targets if isinstance(task.owner, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def is_awaited(scope: Scope, call: CallFact) -> bool:
    """Return whether the task has a name that is awaited, alone, later on."""
    if not isinstance(call.owner, ast.Assign):
        return call.role in {"element", "argument"}
    called = names(call)
    return any(_waits(use) for name in called for use in scope.uses.get(name, ())) or any(
        isinstance(outcome.value, ast.Name) and outcome.value.id in called
        for outcome in scope.returns
    )


def _waits(use: Use) -> bool:
    if use.role == "argument" and isinstance(use.owner, ast.Call):
        name = last_name(use.owner)
        return name in _WAITED_BY or "wait" in name
    return use.role in {"await", "element", "return"}


def is_kept(scope: Scope, call: CallFact) -> bool:
    """Return whether the task is put where somebody else finds and awaits it."""
    if not isinstance(call.owner, ast.Assign):
        return False
    kept = set(_kept_at(call.owner))
    # Who keeps a task in an object means to do something with it.
    if any(dotted_root(path) == dotted_root(own_name(scope)) for path in kept):
        return True
    return any(
        _waits(use) or use.role == "loop" or (use.role == "method" and use.name in _TAKES)
        for other in scope.module.scopes
        for path in kept
        for use in other.uses.get(path, ())
    )


def _kept_at(node: ast.Assign) -> Iterator[str]:
    """``self.task = ...`` and ``tasks[number] = ...``."""
    for target in node.targets:
        place = target.value if isinstance(target, ast.Subscript) else target
        path = dotted(place)
        if path is not None and not isinstance(target, ast.Name):
            yield path
