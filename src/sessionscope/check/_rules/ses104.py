"""``Depends`` gets a factory, so nobody closes the session.

## What it does

Flags ``Depends(SessionLocal)``, ``Depends(sessionmaker(...))`` and ``Depends()`` of a function
that returns a new session instead of yielding it.

## Why it bites in production

FastAPI calls the factory and hands the session over, but it can only clean up after a generator.
The session is never closed: "QueuePool limit of size 5 overflow 10 reached" after a few requests
at once. With a plain ``sessionmaker``, its parameters even become query parameters.

## Example

```python
@app.get("/users")
def read_users(db: Session = Depends(SessionLocal)): ...
```

## Use instead

```python
def get_db():
    with SessionLocal() as db:
        yield db

@app.get("/users")
def read_users(db: Session = Depends(get_db)): ...
```

## When to ignore

Where the endpoint itself closes the session on every path.
"""

import ast
from collections.abc import Iterator

from sessionscope.check._facts import Scope
from sessionscope.check._finding import Finding, Rule
from sessionscope.check._model import Because, Model


def judge(model: Model) -> Iterator[Finding]:
    """Find dependencies that nobody can clean up."""
    told = set[int]()
    for scope, call in model.depends:
        provider = call.args[0] if call.args else None
        value = model.value(provider, scope)
        if provider is None or value is None:
            continue
        if value.kind == "factory" or (value.kind == "external" and value.name in _CLASSES):
            what, because = "is a factory", Because(scope, value.node, "the factory")
        elif value.kind == "function" and isinstance(value.target, Scope):
            made = model.infer.result(value.target)
            if made is None or made.kind != "session" or not made.fresh or id(value.target) in told:
                continue
            told.add(id(value.target))
            what = "returns a new session"
            because = Because(value.target, value.target.function, "it returns a new session")
        else:
            continue
        yield model.finding(
            RULE,
            scope,
            call,
            f"`{ast.unparse(provider)}` {what}, and FastAPI cleans up after generators "
            'alone: the session is never closed, until "QueuePool limit reached". Depend on a '
            "generator with the `yield` inside `with ... as session:`",
            because=[because],
        )


_CLASSES = frozenset(
    {"sqlalchemy.orm.Session", "sqlmodel.Session", "sqlalchemy.ext.asyncio.AsyncSession"}
)

RULE = Rule("SES104", "depends-on-factory", "on", judge)
