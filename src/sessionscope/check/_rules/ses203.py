"""Two coroutines use one session at the same time.

## What it does

Flags one session in several coroutines of ``gather``, ``wait``, ``as_completed`` or a TaskGroup,
in a task that is not over when another one starts or the function itself uses it, and in an
unawaited ``create_task``.

## Why it bites in production

A session does one thing at a time. "This session is provisioning a new connection; concurrent
operations are not permitted", "another operation is in progress", and connections that never
come back to the pool. On a warm pool it may work for weeks. The calls of a plain ``Session`` block,
so that its coroutines take turns at each ``await``: one commits or rolls back what the other has
half done. It is flagged where a coroutine waits before it has committed what it wrote.

## Example

```python
users, orders = await asyncio.gather(load_users(session), load_orders(session))
```

## Use instead

```python
users = await load_users(session)
orders = await load_orders(session)
```

## When to ignore

Where a lock lets only one coroutine at a time near the session.
"""

import ast
from collections.abc import Iterator
from typing import NamedTuple

from sessionscope.check._escapes import Escape, captured, escapes, is_made_anew
from sessionscope.check._facts import Block, CallFact, Scope, last_name, position
from sessionscope.check._finding import Finding, Rule
from sessionscope.check._model import Because, Model
from sessionscope.check._tasks import SEVERAL, is_awaited, is_kept, names
from sessionscope.check._unsaved import writes

_ONE = frozenset({"create_task", "ensure_future", "start_soon", "start_soon_task"})
_CLOSES = frozenset({"close", "aclose"})  # in a task of its own, so that no cancel stops it
_COMPREHENSIONS = (ast.ListComp, ast.GeneratorExp, ast.SetComp)


class _Coroutine(NamedTuple):
    """One coroutine among several, or one that stands for many."""

    call: ast.Call
    many: bool = False
    block: Block | None = None  # where it is put into a list


def judge(model: Model) -> Iterator[Finding]:
    """Find sessions that run in two coroutines."""
    for scope in model.functions:
        started: dict[str, list[CallFact]] = {}
        waiting: dict[str, CallFact] = {}
        for call in scope.calls:
            last = call.name
            if last in SEVERAL and _is_asyncio(model, scope, call.node):
                yield from _together(model, scope, call)
            elif last in _ONE and _starts(model, scope, call.node):
                yield from _alone(model, scope, call, started, waiting)


def _is_asyncio(model: Model, scope: Scope, node: ast.Call) -> bool:
    return model.external(node.func, scope).partition(".")[0] in {"asyncio", "aiometer"}


def _starts(model: Model, scope: Scope, node: ast.Call) -> bool:
    """asyncio's own functions, and methods of loops and task groups."""
    return _is_asyncio(model, scope, node) or isinstance(node.func, ast.Attribute)


def _together(model: Model, scope: Scope, call: CallFact) -> Iterator[Finding]:
    found: dict[str, Escape] = {}
    for coroutine in _coroutines(scope, call.node.args):
        escape = _session_of(model, scope, coroutine.call)
        if escape is None:
            continue
        many = coroutine.many or _is_looped(scope, coroutine.block, escape)
        if many or escape.shown in found:
            yield _finding(model, scope, call.node, escape, "several coroutines")
            return
        found[escape.shown] = escape


def _is_looped(scope: Scope, block: Block | None, escape: Escape) -> bool:
    """Return whether a loop around *block* uses one session in each of its turns."""
    bindings = scope.bindings.get(escape.shown, ())
    return block is not None and any(
        around.kind == "loop" and not any(around in b.block.chain() for b in bindings)
        for around in block.chain()
    )


def _coroutines(scope: Scope, nodes: list[ast.expr], depth: int = 0) -> Iterator[_Coroutine]:
    """Yield the coroutine calls among *nodes*."""
    for node in nodes:
        value = node.value if isinstance(node, ast.Starred) else node
        if isinstance(value, ast.Call) and last_name(value) in _ONE and value.args:
            value = value.args[0]
        if isinstance(value, ast.Call):
            yield _Coroutine(value)
        elif isinstance(value, _COMPREHENSIONS) and isinstance(value.elt, ast.Call):
            inner = value.elt
            if last_name(inner) in _ONE and inner.args and isinstance(inner.args[0], ast.Call):
                inner = inner.args[0]
            yield _Coroutine(inner, many=True)
        elif isinstance(value, ast.List | ast.Tuple):
            yield from _coroutines(scope, value.elts, depth)
        elif isinstance(value, ast.Name) and depth < 2:
            yield from _collected(scope, value.id, depth)


def _collected(scope: Scope, name: str, depth: int) -> Iterator[_Coroutine]:
    """What was put into the list *name* that is awaited as a whole."""
    for binding in scope.bindings.get(name, ()):
        if isinstance(binding.value, ast.expr):
            yield from _coroutines(scope, [binding.value], depth + 1)
    for use in scope.uses.get(name, ()):
        if use.role == "method" and use.name == "append" and isinstance(use.node, ast.Call):
            for inner in _coroutines(scope, use.node.args, depth + 1):
                yield _Coroutine(inner.call, block=use.block)


def _session_of(model: Model, scope: Scope, call: ast.Call) -> Escape | None:
    """Return the session of this flow that the coroutine uses."""
    found = next(escapes(model, [*call.args, *(k.value for k in call.keywords)], scope), None)
    if found is not None:
        return found if found.value.is_async or _is_half_done(model, scope, call) else None
    if isinstance(call.func, ast.Attribute):  # session.execute(...)
        held = call.func.value
        value = model.session(held, scope)
        if value is not None and value.kind == "session" and not is_made_anew(held, value):
            return Escape(value, held, scope, ast.unparse(held)) if value.is_async else None
    function = model.value(call.func, scope)
    if function is None or function.kind != "function" or not isinstance(function.target, Scope):
        return None
    inner = captured(model, function.target, bound=function.bound is not None)
    if inner is None or _locks(function.target):
        return None
    if inner.value.is_async or writes(model, function.target, inner.shown).at_await is not None:
        return inner
    return None


def _is_half_done(model: Model, scope: Scope, call: ast.Call) -> bool:
    """Return whether the coroutine waits while a plain session holds what it wrote.

    Between two ``await`` nobody else is at work.
    """
    function = model.called(call, scope)
    if function is None or function.kind != "function":
        return False
    return any(
        writes(model, function, name).at_await is not None
        for name in function.bindings
        if model.session(model.argument_for(call, function, name), scope) is not None
    )


def _locks(function: Scope) -> bool:
    return any(_names_a_lock(node) for node, _ in function.withs)


def _names_a_lock(node: ast.With | ast.AsyncWith) -> bool:
    return any("lock" in ast.unparse(item.context_expr).lower() for item in node.items)


def _alone(
    model: Model,
    scope: Scope,
    call: CallFact,
    started: dict[str, list[CallFact]],
    waiting: dict[str, CallFact],
) -> Iterator[Finding]:
    """A task beside this flow: nobody waits for it, or there are two of them."""
    node = call.node.args[0] if call.node.args else None
    if last_name(call.node).startswith("start_soon"):
        escape = next(escapes(model, call.node.args, scope), None)
    elif isinstance(node, ast.Call) and last_name(node) not in _CLOSES:
        escape = _session_of(model, scope, node)
    else:
        return
    if escape is None or call.role == "await":
        return
    if is_awaited(scope, call):
        beside = _used_beside(model, scope, call, escape)
        if beside is not None:
            what = "a task and by this function"
            yield _finding(model, scope, call.node, escape, what, beside.node)
            return
        if _runs_beside(scope, waiting.get(escape.shown), call):
            yield _finding(model, scope, call.node, escape, "several tasks")
        waiting[escape.shown] = call
        return
    if is_kept(scope, call):
        beside = _used_beside(model, scope, call, escape, outlives=True)
        is_own = "." in escape.shown  # of the object that keeps the task as well
        if not is_own and (beside is not None or escape.value.scope is scope):
            what = "a task and by this function"
            yield _finding(model, scope, call.node, escape, what, beside and beside.node)
        return
    group = _in_group(scope, call)
    looped = _is_looped(scope, call.block, escape)
    same = started.setdefault(escape.shown, [])
    same.append(call)
    if group and not looped and len(same) != 2:
        return
    if len(same) <= 2:
        what = "several tasks" if group or looped else "a task that nobody waits for"
        if group or len(same) == 1:
            yield _finding(model, scope, call.node, escape, what)


def _runs_beside(scope: Scope, first: CallFact | None, call: CallFact) -> bool:
    """Return whether the task *first* is awaited, by its name alone, after *call* starts one."""
    if first is None or first.block not in call.block.chain():
        return False
    uses = [use for name in names(first) for use in scope.uses.get(name, ())]
    if not {use.role for use in uses} <= {"await", "method", "attribute"}:
        return False
    awaited = [position(use.node) for use in uses if use.role == "await"]
    return bool(awaited) and position(call.node) < min(awaited)


def _used_beside(
    model: Model, scope: Scope, task: CallFact, escape: Escape, *, outlives: bool = False
) -> CallFact | None:
    """Return what awaits the task's session after the task was started, and before it is over.

    One that *outlives* this function is not over before its end.
    """
    uses = [use for name in names(task) for use in scope.uses.get(name, ())]
    over = [
        position(use.node)
        for use in uses
        if use.role not in {"method", "attribute"} or use.name in {"cancel", "add_done_callback"}
    ]
    later = [place for place in over if place > position(task.node)]
    if not (later or outlives):
        return None
    for other in scope.calls:
        between = position(task.node) < position(other.node)
        between = between and (outlives or position(other.node) < min(later))
        if not between or other.role != "await" or task.block not in other.block.chain():
            continue
        if other.name in _CLOSES or _is_locked(other.block):
            continue
        used = _session_of(model, scope, other.node)
        if used is not None and used.shown == escape.shown:
            return other
    return None


def _is_locked(block: Block) -> bool:
    return any(
        isinstance(around.node, ast.With | ast.AsyncWith) and _names_a_lock(around.node)
        for around in block.chain()
    )


def _in_group(scope: Scope, call: CallFact) -> bool:
    function = call.node.func
    if not isinstance(function, ast.Attribute):
        return False
    name = ast.unparse(function.value)
    return any(
        isinstance(b.value, ast.Call) and last_name(b.value) in {"TaskGroup", "create_task_group"}
        for b in scope.bindings.get(name, ())
    )


def _finding(
    model: Model,
    scope: Scope,
    node: ast.Call,
    escape: Escape,
    where: str,
    beside: ast.Call | None = None,
) -> Finding:
    return model.finding(
        RULE,
        scope,
        node,
        f"`{escape.shown}` is used by {where}, at the same time: {_harm(escape)}. Await one after "
        "the other, or open a session in each",
        because=[
            Because(escape.value.scope or scope, escape.value.node, "the session is made here"),
            Because(escape.scope, escape.node, "and used by the coroutine here"),
            Because(scope, beside, "while this function uses it, too"),
        ],
    )


def _harm(escape: Escape) -> str:
    if escape.value.is_async:
        return (
            '"concurrent operations are not permitted", and connections that never come back to '
            "the pool"
        )
    return (
        "they take turns at each `await`, in one transaction, so that one commits or rolls back "
        "what the other has half done"
    )


RULE = Rule("SES203", "session-shared-by-coroutines", "on", judge)
