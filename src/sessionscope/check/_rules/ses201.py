"""A session lives at module or class level.

## What it does

Flags a ``Session`` bound at the top of an imported module, in a class body, or as the default of
a parameter.

## Why it bites in production

All threads and requests share one session and one connection: "This session is provisioning a new
connection; concurrent operations are not permitted", rows of one request committed by another.
After one failed statement every request fails with PendingRollbackError until the process is
restarted.

## Example

```python
session = SessionLocal()

def read_users():
    return session.scalars(select(User)).all()
```

## Use instead

```python
def read_users(session: Session):
    return session.scalars(select(User)).all()
```

## When to ignore

In a script that runs once, in one thread. The default argument of a function that start-up alone
calls, and that closes it, is not flagged.
"""

import ast
from collections.abc import Iterator

from sessionscope.check._facts import Binding, Module, Scope, parameters
from sessionscope.check._finding import Finding, Rule
from sessionscope.check._model import Because, Model, is_migration
from sessionscope.check._ownership import CLOSING
from sessionscope.check._values import Value


def judge(model: Model) -> Iterator[Finding]:
    """Find sessions that the whole process shares."""
    for module in model.modules:
        if is_migration(module) or model.is_script(module):
            continue
        for scope in module.scopes:
            if scope.kind == "function":
                yield from _defaults(model, scope)
            elif all(s.kind != "function" for s in scope.around()):
                yield from _bound(model, module, scope)


def _bound(model: Model, module: Module, scope: Scope) -> Iterator[Finding]:
    for name, bindings in scope.bindings.items():
        for binding in bindings:
            node = binding.value
            if binding.kind != "value" or not isinstance(node, ast.Call | ast.Await):
                continue
            if _elsewhere(module, scope, binding) or _ends_here(scope, name):
                continue
            value = _made(model, node, scope)
            if value is not None:
                yield _finding(
                    model, scope, node, name, "class" if scope.kind == "class" else "module"
                )


def _made(model: Model, node: ast.expr, scope: Scope) -> Value | None:
    """Return the session, unless it is a registry's or one that came from elsewhere."""
    value = model.session(node, scope)
    if value is None or value.kind != "session" or value.scoped:
        return None
    inner = node.value if isinstance(node, ast.Await) else node
    driven = isinstance(inner, ast.Call) and ast.unparse(inner.func) in {"next", "anext"}
    return value if value.fresh or driven else None


def _elsewhere(module: Module, scope: Scope, binding: Binding) -> bool:
    """Under ``if __name__ == "__main__"``, or bound by a function through ``global``."""
    blocks = list(binding.block.chain())
    if any(isinstance(b.node, ast.If) and "__name__" in ast.unparse(b.node.test) for b in blocks):
        return True
    return scope.kind == "module" and blocks[-1].node is not module.scope.node


def _ends_here(scope: Scope, name: str) -> bool:
    return any(use.role == "method" and use.name in CLOSING for use in scope.uses.get(name, ()))


def _defaults(model: Model, scope: Scope) -> Iterator[Finding]:
    node = scope.function
    outer = scope.parent
    if node is None or outer is None or (scope.module.scope is not outer and outer.kind != "class"):
        return
    for argument, default in parameters(node):
        if isinstance(default, ast.Call) and _made(model, default, outer) is not None:
            if _is_injected(model, default, outer) or _starts_up(model, scope, argument.arg):
                continue
            yield _finding(model, outer, default, argument.arg, "function")


def _starts_up(model: Model, scope: Scope, name: str) -> bool:
    """Return whether the function runs once, at start-up, and then closes the session."""
    callers = model.callers(scope)
    once = bool(callers) and all(model.in_context(c.scope) == "start-up" for c in callers)
    return once and _ends_here(scope, name)


def _is_injected(model: Model, default: ast.Call, scope: Scope) -> bool:
    function = model.value(default.func, scope)
    return function is not None and function.name.rpartition(".")[2] in {"Depends", "Security"}


def _finding(model: Model, scope: Scope, node: ast.expr, name: str, where: str) -> Finding:
    place = {
        "module": "is made when the module is imported",
        "class": "is made once for the class",
        "function": "is made once, when the function is defined",
    }[where]
    return model.finding(
        RULE,
        scope,
        node,
        f"`{name}` {place}, and all threads and requests share it: one failed statement and every "
        "later one raises PendingRollbackError. Keep the sessionmaker here and open a session "
        "per unit of work",
        because=[Because(scope, node, f"`{name}` is made here")],
    )


RULE = Rule("SES201", "module-level-session", "on", judge)
