"""An engine is used before worker processes are forked from it.

## What it does

Flags a module-level engine that the module itself connects with, in a project that forks
(``os.fork``, multiprocessing, Celery's prefork pool, Gunicorn's ``preload_app``) and neither
disposes of the engine in the child nor makes it there.

## Why it bites in production

The children inherit the open sockets of the pool and talk over one another: results of one
process's query reach another, "lost synchronization with server", processes that hang.

## Example

```python
engine = create_engine(URL)
Base.metadata.create_all(engine)  # opens a connection in the parent

app = Celery("shop")
```

## Use instead

```python
@worker_process_init.connect
def fresh_connections(**_):
    engine.dispose(close=False)
```

## When to ignore

Where the workers are threads or are spawned, not forked.
"""

import ast
from collections.abc import Iterator

from sessionscope.check._facts import Scope, Use
from sessionscope.check._finding import Finding, Rule
from sessionscope.check._model import Because, Model, is_migration

_CONNECTS = frozenset({"connect", "begin", "raw_connection"})
_MENDS = frozenset(
    {
        "worker_process_init",
        "register_after_fork",
        "register_at_fork",
        "dispose",
        "post_fork",
        "postfork",
        "NullPool",
    }
)


def judge(model: Model) -> Iterator[Finding]:
    """Find engines whose sockets go to the children."""
    fork = _forks(model)
    if fork is None or _is_mended(model):
        return
    for module in model.modules:
        if is_migration(module) or model.is_script(module):
            continue
        for call in module.scope.calls:
            value = model.value(call.node, module.scope)
            if value is None or value.kind != "engine" or value.node is not call.node:
                continue
            connected = _connected(model, module.scope)
            if connected is not None:
                yield model.finding(
                    RULE,
                    module.scope,
                    call.node,
                    "This engine is connected while its module is imported, and the workers are "
                    "forked from that process: they share its sockets and read one another's "
                    "results. Call `engine.dispose(close=False)` first thing in each worker",
                    confidence="medium",
                    because=[Because(module.scope, connected, "connected here"), fork],
                )


def _forks(model: Model) -> Because | None:
    for scope, call in model.calls_of(("fork", "Celery", "Process", "Pool")):
        name = model.external(call.node.func, scope)
        if name in {"os.fork", "celery.Celery", "celery.app.Celery"} or name.startswith(
            "multiprocessing."
        ):
            return Because(scope, call.node, "workers are forked from here")
    return None


def _is_mended(model: Model) -> bool:
    return any(
        not _MENDS.isdisjoint(scope.uses)
        or not _MENDS.isdisjoint(scope.bindings)
        or any(use.name in _MENDS for uses in scope.uses.values() for use in uses)
        for scope in model.scopes
    )


def _connected(model: Model, scope: Scope) -> ast.expr | None:
    """Return what connects an engine while the module is imported."""
    for uses in scope.uses.values():
        for use in uses:
            if _connects(model, scope, use):
                return use.node
    return None


def _connects(model: Model, scope: Scope, use: Use) -> bool:
    node = use.node
    if use.role != "method" or not isinstance(node, ast.Call):
        return False
    if any(
        isinstance(b.node, ast.If) and "__name__" in ast.unparse(b.node.test)
        for b in use.block.chain()
    ):
        return False
    if use.name in {"create_all", "reflect"}:
        return True
    if use.name not in _CONNECTS or not isinstance(node.func, ast.Attribute):
        return False
    value = model.value(node.func.value, scope)
    return value is not None and value.kind == "engine"


RULE = Rule("SES302", "engine-before-fork", "info", judge)
