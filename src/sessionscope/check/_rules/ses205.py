"""A synchronous session is used in an ``async def`` function.

## What it does

Flags ``execute()``, ``query()``, ``commit()``, ``flush()`` and their like on a synchronous
``Session`` directly in an ``async def`` function. One finding per function and session.

## Why it bites in production

The event loop stands still until the database has answered: no other request is served meanwhile,
health checks included. When the pool is empty, the loop waits for a connection that only the loop
could give back: 30 seconds of silence, then "QueuePool limit of size 5 overflow 10 reached".

## Example

```python
@app.get("/users/{user_id}")
async def read_user(user_id: int, db: Session = Depends(get_db)):
    return db.get(User, user_id)
```

## Use instead

```python
@app.get("/users/{user_id}")
def read_user(user_id: int, db: Session = Depends(get_db)):
    return db.get(User, user_id)
```

## When to ignore

Where the event loop serves nobody else. It is not flagged where that shows: below
``asyncio.run(main())``, until something there starts tasks or servers.
"""

import ast
from collections.abc import Iterator

from sessionscope.check._facts import STATEMENTS, Scope, Use, position
from sessionscope.check._finding import Confidence, Finding, Rule
from sessionscope.check._loops import has_loop_to_itself
from sessionscope.check._model import Because, Model
from sessionscope.check._values import Value

_BLOCKING = (STATEMENTS | {"rollback"}) - {"merge_all"}
_OF_THE_LOOP = frozenset(
    {
        "create_task",
        "ensure_future",
        "start_soon",
        "get_running_loop",
        "get_event_loop",
        "current_task",
    }
)


def judge(model: Model) -> Iterator[Finding]:
    """Find functions that stop the event loop."""
    for scope in model.functions:
        if not scope.is_async:
            continue
        told = set[str]()
        for path, use, value in model.session_uses(scope):
            if value.is_async or path in told or use.name not in _BLOCKING:
                continue
            if _is_awaited(scope, use):
                continue
            told.add(path)
            yield _finding(model, scope, path, use, value)
        yield from _inline(model, scope)
        yield from _units(model, scope, told)


def _is_awaited(scope: Scope, use: Use) -> bool:
    return any(call.node is use.node and call.role == "await" for call in scope.calls)


def _inline(model: Model, scope: Scope) -> Iterator[Finding]:
    """``SessionLocal().query(...)``."""
    for call in scope.calls:
        owner = call.owner
        if call.role != "method" or not isinstance(owner, ast.Call):
            continue
        value = model.session(call.node, scope)
        if value is None or value.is_async or not isinstance(owner.func, ast.Attribute):
            continue
        if owner.func.attr in _BLOCKING:
            yield _finding(
                model,
                scope,
                ast.unparse(call.node),
                Use("method", owner.func.attr, owner, owner, call.block),
                value,
            )
            return


def _units(model: Model, scope: Scope, told: set[str]) -> Iterator[Finding]:
    """``database.run(work)``, and ``with database.begin()`` where nothing else waits in it."""
    for call in scope.calls:
        function = call.node.func
        if call.name not in {"run", "begin"} or not isinstance(function, ast.Attribute):
            continue
        base = model.value(function.value, scope)
        if base is None or base.name != "sessionscope.Database" or call.role == "await":
            continue
        if call.name == "begin" and (call.role != "with" or _names_of(scope, call.node) & told):
            continue
        use = Use("method", call.name, call.node, call.owner, call.block)
        yield _finding(model, scope, ast.unparse(function.value), use, base)


def _names_of(scope: Scope, unit: ast.Call) -> set[str]:
    return {
        name
        for name, bindings in scope.bindings.items()
        if any(b.kind == "with" and b.value is unit for b in bindings)
    }


def _finding(model: Model, scope: Scope, path: str, use: Use, value: Value) -> Finding:
    # Only what a framework calls gets a thread of its own as a plain function.
    may_be_plain = (
        model.context(scope) in {"endpoint", "dependency"}
        and _can_be_sync(scope)
        and not _is_awaited_itself(model, scope)
    )
    instead = (
        "Write `def` instead of `async def`, or use an AsyncSession"
        if may_be_plain
        else "Use an AsyncSession, or do this in a plain function: `await asyncio.to_thread(work)`"
    )
    return model.finding(
        RULE,
        scope,
        use.node,
        f"`{path}.{use.name}()` stops the event loop of `{scope.name}` until the database has "
        'answered: nobody else is served, and an empty pool means "QueuePool limit reached" '
        f"after 30 s of silence. {instead}",
        confidence=_confidence(model, scope, use),
        because=[
            Because(scope, scope.function, f"`{scope.name}` runs on the event loop"),
            Because(value.scope or scope, value.node, "the session is synchronous"),
        ],
        fix=may_be_plain and model.context(scope) == "endpoint",
    )


def _is_awaited_itself(model: Model, scope: Scope) -> bool:
    """Return whether the project awaits the function: by its name, or in a decorator."""
    if any(called.call.role == "await" for called in model.callers(scope)):
        return True
    for node in scope.decorators:
        plain = node.func if isinstance(node, ast.Call) else node
        found = model.value(plain, scope.parent or scope)
        decorator = found.target if found is not None and found.kind == "function" else None
        if isinstance(decorator, Scope) and any(inner.is_async for inner in decorator.within()):
            return True
    return False


def _confidence(model: Model, scope: Scope, use: Use) -> Confidence:
    context = model.in_context(scope)
    if context in {"start-up", "command"} or (
        not context
        and (
            (model.runs_once(scope) and _run_by_script(model, scope))
            or has_loop_to_itself(model, scope, position(use.node))
        )
    ):
        return "low"
    return "high"


def _run_by_script(model: Model, scope: Scope) -> bool:
    """``asyncio.run(main())``: nobody else is on this loop."""
    return any(
        isinstance(called.call.owner, ast.Call)
        and ast.unparse(called.call.owner.func).endswith("run")
        for called in model.callers(scope)
    )


def _can_be_sync(scope: Scope) -> bool:
    """Return whether nothing in the function needs the event loop."""
    node = scope.function
    if node is None:
        return False
    return not any(
        isinstance(inner, ast.Await | ast.AsyncFor | ast.AsyncWith | ast.Yield | ast.YieldFrom)
        or (isinstance(inner, ast.Attribute) and inner.attr in _OF_THE_LOOP)
        or (isinstance(inner, ast.Name) and inner.id in _OF_THE_LOOP)
        or (isinstance(inner, ast.comprehension) and inner.is_async)
        for inner in ast.walk(node)
    )


RULE = Rule("SES205", "sync-session-in-async", "on", judge, fix="unsafe")
