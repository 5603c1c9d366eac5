"""A scoped_session of a server is never removed.

## What it does

Flags a ``scoped_session`` or ``async_scoped_session`` in a project that serves requests or runs
tasks and calls ``remove()`` nowhere.

## Why it bites in production

The registry keeps one session per thread for ever. A failed transaction of one request is met by
the next one on the same thread (PendingRollbackError), it reads stale objects, and each thread
keeps its connection "idle in transaction".

## Example

```python
db_session = scoped_session(sessionmaker(engine))

@app.route("/users")
def users():
    return render(db_session.scalars(select(User)).all())
```

## Use instead

```python
@app.teardown_appcontext
def remove_session(error):
    db_session.remove()
```

## When to ignore

Where a library removes it.
"""

from collections.abc import Iterator

from sessionscope.check._finding import Finding, Rule
from sessionscope.check._model import Because, Model

_SERVERS = frozenset(
    {
        "fastapi",
        "flask",
        "starlette",
        "celery",
        "dramatiq",
        "rq",
        "pyramid",
        "tornado",
        "bottle",
        "falcon",
        "sanic",
        "aiohttp",
        "quart",
        "litestar",
    }
)


def judge(model: Model) -> Iterator[Finding]:
    """Find registries that live as long as their threads."""
    if not model.libraries & _SERVERS or _removes(model) or _closes(model):
        return
    for module in model.modules:
        if model.is_script(module):
            continue
        for call in module.scope.calls:
            value = model.value(call.node, module.scope)
            if value is not None and value.kind == "registry" and value.node is call.node:
                yield model.finding(
                    RULE,
                    module.scope,
                    call.node,
                    "This registry keeps a session per thread, and nothing here calls "
                    "`.remove()`: the next request on the thread meets its failed transaction "
                    '(PendingRollbackError) and its connection stays "idle in transaction". '
                    "Call `.remove()` when a request or task ends",
                    because=[Because(module.scope, call.node, "made here for all threads")],
                    confidence="medium",
                )


def _removes(model: Model) -> bool:
    """Any remove() without arguments counts, as does passing it on."""
    return any(
        use.name == "remove"
        and (
            use.role == "attribute"
            or (use.role == "method" and not getattr(use.node, "args", None))
        )
        for scope in model.scopes
        for uses in scope.uses.values()
        for use in uses
    )


def _closes(model: Model) -> bool:
    """A provider that closes what the registry gave leaves nothing in it for the next request."""
    return any(
        value.scoped and use.name == "close" and any(b.kind == "finally" for b in use.block.chain())
        for scope in model.functions
        for _, use, value in model.session_uses(scope)
    )


RULE = Rule("SES109", "scoped-session-not-removed", "info", judge)
