"""A provider closes its session only if nothing raises.

## What it does

Flags a generator that yields a session it made and closes it after the ``yield``, but not in a
``finally`` block; or does not close it at all.

## Why it bites in production

An exception in the code that uses the session is thrown into the generator at the ``yield``: the
lines below it do not run. Every failing request keeps a connection, until the pool is empty:
"QueuePool limit of size 5 overflow 10 reached".

## Example

```python
def get_db():
    db = SessionLocal()
    yield db
    db.close()
```

## Use instead

```python
def get_db():
    with SessionLocal() as db:
        yield db
```

## When to ignore

Never in a server.
"""

import ast
from collections.abc import Iterator

from sessionscope.check._facts import Outcome, decorator_names, position
from sessionscope.check._finding import Finding, Rule
from sessionscope.check._model import Because, Model, is_migration
from sessionscope.check._ownership import Owned, marks, nested_use, owned
from sessionscope.check._paths import IDLE, OPEN, leave


def judge(model: Model) -> Iterator[Finding]:
    """Find generators that lose their session when their consumer fails."""
    for scope in model.functions:
        if not scope.is_generator or is_migration(scope.module):
            continue
        if "fixture" not in decorator_names(scope):
            for session in owned(model, scope):
                yield from _judge_session(model, session)


def _judge_session(model: Model, session: Owned) -> Iterator[Finding]:
    scope = session.scope
    node = scope.function
    yields = [use for use in scope.uses.get(session.name, ()) if use.role == "yield"]
    if node is None or not yields or nested_use(scope, session.name):
        return
    found = marks(model, session)
    # The consumer uses the session at the yield, and may raise there.
    for use in yields:
        found.given.discard(id(use.node))
        found.used.add(id(use.owner))
    # What fails before the `yield` is no consumer's error.
    made = position(session.made)
    first = min((position(u.node) for u in yields if position(u.node) > made), default=made)
    found.used -= {
        id(node)
        for use in scope.uses[session.name]
        if position(use.node) < first
        for node in (use.node, use.owner)
    }
    exits, _ = leave(node.body, found)
    left = exits.raised | exits.falls | exits.returned
    if not left & OPEN and not (left & IDLE and not found.closed):
        return
    how = (
        "is closed after the `yield`, but not in a `finally`: each request that fails keeps its "
        "connection"
        if found.closed
        else "is never closed: each request keeps its connection until the garbage collector comes"
    )
    outcome: Outcome = scope.yields[0]
    yield model.finding(
        RULE,
        scope,
        session.made,
        f"`{session.name}` {how}, until "
        f'"QueuePool limit reached". Put the `yield` inside `with ... as {session.name}:`',
        because=[
            Because(scope, session.made, f"`{session.name}` is made here"),
            Because(scope, outcome.value, "an exception of the consumer is raised here"),
        ],
        confidence="high" if left & OPEN else "medium",
        fix=_is_closed_last(node.body[-1], session),
    )


def _is_closed_last(last: ast.stmt, session: Owned) -> bool:
    """Return whether the fix fits: the session is made and closed in the same run of lines."""
    close = last.value if isinstance(last, ast.Expr) else None
    close = close.value if isinstance(close, ast.Await) else close
    return (
        isinstance(close, ast.Call)
        and ast.unparse(close) == f"{session.name}.close()"
        and session.binding.block.kind == "body"
    )


RULE = Rule("SES103", "provider-without-finally", "on", judge, fix="safe")
