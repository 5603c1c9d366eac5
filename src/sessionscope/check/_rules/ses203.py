"""Two coroutines use one session at the same time.

## What it does

Flags one session in several coroutines of ``gather``, ``wait``, ``as_completed`` or a TaskGroup,
and in an unawaited ``create_task``.

## Why it bites in production

A session does one thing at a time. "This session is provisioning a new connection; concurrent
operations are not permitted", "another operation is in progress", and connections that never
come back to the pool. On a warm pool it may work for weeks.

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

from sessionscope.check._escapes import Escape, captured, escapes
from sessionscope.check._facts import CallFact, Scope, last_name
from sessionscope.check._finding import Finding, Rule
from sessionscope.check._model import Because, Model

_SEVERAL = frozenset({"gather", "wait", "as_completed"})
_ONE = frozenset({"create_task", "ensure_future", "start_soon", "start_soon_task"})
_WAITED_BY = _SEVERAL | {"wait_for", "shield", "append", "run_until_complete"}
_COMPREHENSIONS = (ast.ListComp, ast.GeneratorExp, ast.SetComp)


def judge(model: Model) -> Iterator[Finding]:
    """Find sessions that run in two coroutines."""
    for scope in model.functions:
        started: dict[str, list[CallFact]] = {}
        for call in scope.calls:
            last = call.name
            if last in _SEVERAL and _is_asyncio(model, scope, call.node):
                yield from _together(model, scope, call)
            elif last in _ONE and _starts(model, scope, call.node):
                yield from _alone(model, scope, call, started)


def _is_asyncio(model: Model, scope: Scope, node: ast.Call) -> bool:
    return model.external(node.func, scope).partition(".")[0] in {"asyncio", "aiometer"}


def _starts(model: Model, scope: Scope, node: ast.Call) -> bool:
    """asyncio's own functions, and methods of loops and task groups."""
    return _is_asyncio(model, scope, node) or isinstance(node.func, ast.Attribute)


def _together(model: Model, scope: Scope, call: CallFact) -> Iterator[Finding]:
    found: dict[str, Escape] = {}
    for coroutine, many in _coroutines(scope, call.node.args):
        escape = _session_of(model, scope, coroutine)
        if escape is None:
            continue
        if many or escape.shown in found:
            yield _finding(model, scope, call.node, escape, "several coroutines")
            return
        found[escape.shown] = escape


def _coroutines(
    scope: Scope, nodes: list[ast.expr], depth: int = 0
) -> Iterator[tuple[ast.Call, bool]]:
    """Yield the coroutine calls among *nodes*, and whether each stands for many."""
    for node in nodes:
        value = node.value if isinstance(node, ast.Starred) else node
        if isinstance(value, ast.Call) and last_name(value) in _ONE and value.args:
            value = value.args[0]
        if isinstance(value, ast.Call):
            yield value, False
        elif isinstance(value, _COMPREHENSIONS) and isinstance(value.elt, ast.Call):
            inner = value.elt
            if last_name(inner) in _ONE and inner.args and isinstance(inner.args[0], ast.Call):
                inner = inner.args[0]
            yield inner, True
        elif isinstance(value, ast.List | ast.Tuple):
            yield from _coroutines(scope, value.elts, depth)
        elif isinstance(value, ast.Name) and depth < 2:
            yield from _collected(scope, value.id, depth)


def _collected(scope: Scope, name: str, depth: int) -> Iterator[tuple[ast.Call, bool]]:
    """What was put into the list *name* that is awaited as a whole."""
    for binding in scope.bindings.get(name, ()):
        if isinstance(binding.value, ast.expr):
            yield from _coroutines(scope, [binding.value], depth + 1)
    for use in scope.uses.get(name, ()):
        if use.role == "method" and use.name == "append" and isinstance(use.node, ast.Call):
            looped = any(b.kind == "loop" for b in use.block.chain())
            for inner, _ in _coroutines(scope, use.node.args, depth + 1):
                yield inner, looped


def _session_of(model: Model, scope: Scope, call: ast.Call) -> Escape | None:
    """Return the session of this flow that the coroutine uses."""
    found = next(escapes(model, [*call.args, *(k.value for k in call.keywords)], scope), None)
    if found is not None:
        return found
    if isinstance(call.func, ast.Attribute):  # session.execute(...)
        value = model.session(call.func.value, scope)
        if value is not None and value.kind == "session" and not value.fresh:
            return Escape(value, call.func.value, scope, ast.unparse(call.func.value))
    function = model.value(call.func, scope)
    if function is None or function.kind != "function" or not isinstance(function.target, Scope):
        return None
    inner = captured(model, function.target, bound=function.bound is not None)
    if inner is None or _locks(function.target):
        return None
    return inner


def _locks(function: Scope) -> bool:
    return any(
        "lock" in ast.unparse(item.context_expr).lower()
        for node, _ in function.withs
        for item in node.items
    )


def _alone(
    model: Model, scope: Scope, call: CallFact, started: dict[str, list[CallFact]]
) -> Iterator[Finding]:
    """A task beside this flow: nobody waits for it, or there are two of them."""
    node = call.node.args[0] if call.node.args else None
    if last_name(call.node).startswith("start_soon"):
        escape = next(escapes(model, call.node.args, scope), None)
    elif isinstance(node, ast.Call):
        escape = _session_of(model, scope, node)
    else:
        return
    if escape is None or call.role == "await" or _is_awaited(scope, call):
        return
    group = _in_group(scope, call)
    looped = any(b.kind == "loop" for b in call.block.chain())
    same = started.setdefault(escape.shown, [])
    same.append(call)
    if group and not looped and len(same) != 2:
        return
    if len(same) <= 2:
        what = "several tasks" if group or looped else "a task that nobody waits for"
        if group or len(same) == 1:
            yield _finding(model, scope, call.node, escape, what)


def _in_group(scope: Scope, call: CallFact) -> bool:
    function = call.node.func
    if not isinstance(function, ast.Attribute):
        return False
    name = ast.unparse(function.value)
    return any(
        isinstance(b.value, ast.Call) and last_name(b.value) in {"TaskGroup", "create_task_group"}
        for b in scope.bindings.get(name, ())
    )


def _is_awaited(scope: Scope, call: CallFact) -> bool:
    """Return whether the task has a name that is awaited, alone, later on."""
    owner = call.owner
    if not isinstance(owner, ast.Assign):
        return call.role in {"element", "argument"}
    names = [target.id for target in owner.targets if isinstance(target, ast.Name)]
    return any(
        use.role in {"await", "element", "return"}
        or (
            use.role == "argument"
            and isinstance(use.owner, ast.Call)
            and last_name(use.owner) in _WAITED_BY
        )
        for name in names
        for use in scope.uses.get(name, ())
    )


def _finding(model: Model, scope: Scope, node: ast.Call, escape: Escape, where: str) -> Finding:
    return model.finding(
        RULE,
        scope,
        node,
        f'`{escape.shown}` is used by {where}, at the same time: "concurrent operations are not '
        'permitted", and connections that never come back to the pool. Await one after the '
        "other, or open a session in each",
        because=[
            Because(escape.value.scope or scope, escape.value.node, "the session is made here"),
            Because(escape.scope, escape.node, "and used by the coroutine here"),
        ],
    )


RULE = Rule("SES203", "session-shared-by-coroutines", "on", judge)
