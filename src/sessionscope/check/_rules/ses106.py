"""A business function opens a session of its own.

## What it does

Flags a function that makes a session and is neither an entry point (endpoint, task, command,
script, start-up) nor a provider. Opt-in: ``--select SES106``.

## Why it bites in production

What two such functions do is two transactions: one can commit and the other fail. A caller that
holds a session of its own takes a second connection from the pool, and under load waits for it
for ever: "QueuePool limit of size 5 overflow 10 reached". Tests cannot roll back what it commits.

## Example

```python
def get_user(user_id):
    with SessionLocal() as session:
        return session.get(User, user_id)
```

## Use instead

```python
def get_user(session: Session, user_id):
    return session.get(User, user_id)
```

## When to ignore

Where a function is an entry point that the checker does not know as one.
"""

import ast
from collections.abc import Iterator

from sessionscope.check._facts import Scope
from sessionscope.check._finding import Finding, Rule
from sessionscope.check._model import Because, Model, is_migration
from sessionscope.check._ownership import on_connection
from sessionscope.check._values import Value


def judge(model: Model) -> Iterator[Finding]:
    """Find functions that should receive their session."""
    for scope in model.functions:
        if scope.function is None or is_migration(scope.module) or _may_open(model, scope):
            continue
        for call in scope.calls:
            value = model.session(call.node, scope)
            if value is None or value.kind != "session" or on_connection(value):
                continue
            if value.fresh and value.node is call.node:
                guarded = any(
                    isinstance(b.node, ast.If) and "None" in ast.unparse(b.node.test)
                    for b in call.block.chain()
                )
                if guarded or call.role in {"return", "yield", "element"}:
                    continue
                yield _finding(model, scope, call.node, value)
                break


def _finding(model: Model, scope: Scope, node: ast.Call, value: Value) -> Finding:
    return model.finding(
        RULE,
        scope,
        node,
        f"`{scope.name}()` opens a session of its own: its work is a transaction apart from its "
        'caller\'s, on a second connection ("QueuePool limit reached" under load). Let it '
        "receive the session as a parameter",
        because=[Because(scope, scope.function, f"`{scope.qualname}` is no entry point")],
    )


def _may_open(model: Model, scope: Scope) -> bool:
    if model.in_context(scope) or model.runs_once(scope):
        return True
    made = model.infer.result(scope)
    inner = made.inner if made is not None and made.kind in {"generator", "manager"} else made
    gives = inner is not None and inner.kind == "session"
    return gives or scope.name in {"__init__", "__enter__", "__aenter__", "run"}


RULE = Rule("SES106", "function-opens-own-session", "opt-in", judge)
