"""A dependency commits after its ``yield``, when the response is already sent.

## What it does

Flags a FastAPI dependency whose commit stands after the ``yield`` (or is the end of a ``begin()``
block around it), where FastAPI's version and the dependency's scope put that after the response:
below 0.106, and from 0.118 unless ``scope="function"``. It is a finding where an endpoint writes
with that session, here or in what it calls, and leaves the commit to the dependency.

## Why it bites in production

The client has its "200 OK" before the COMMIT. When the commit fails nobody is told: the row is
missing, the answer was a success. And a client that reads at once what it has written does not
find it.

## Example

```python
def get_db():
    with SessionLocal() as db:
        yield db
        db.commit()
```

## Use instead

```python
@app.post("/users")
def create_user(db: Annotated[Session, Depends(get_db, scope="function")]): ...
```

## When to ignore

Where no client relies on what the answer says. Where the session goes to code that cannot be
followed, from an endpoint that may write, the finding is of medium confidence; where all endpoints
are seen to read, or to commit by themselves, of low confidence.
"""

import ast
from collections.abc import Iterator

from sessionscope.check._committing import late_commit
from sessionscope.check._consumers import Consumer, Consumers
from sessionscope.check._facts import Scope, decorator_names
from sessionscope.check._fastapi import ends_after_response
from sessionscope.check._finding import Confidence, Finding, Rule
from sessionscope.check._model import Because, Model
from sessionscope.check._unsaved import writes

_WRITE = frozenset({"post", "put", "patch", "delete", "api_route", "websocket"})


def judge(model: Model) -> Iterator[Finding]:
    """Find commits that come too late for the client."""
    consumers = Consumers(model)
    for scope in model.functions:
        if not scope.is_generator or decorator_names(scope) & {
            "contextmanager",
            "asynccontextmanager",
            "fixture",
        }:
            continue
        uses = [
            (where, call)
            for where, call in model.dependencies.get(id(scope), ())
            if ends_after_response(model.version, call) is not False
        ]
        if not uses or _is_not_fastapi(model, *uses[0]):
            continue
        commit = late_commit(model, scope)
        if commit is not None:
            yield _finding(model, scope, commit, uses, consumers.of(scope))


def _is_not_fastapi(model: Model, scope: Scope, call: ast.Call) -> bool:
    return not model.external(call.func, scope).startswith("fastapi")


def _relied_on(model: Model, consumers: list[Consumer]) -> tuple[Confidence, tuple[Because, ...]]:
    """Return how sure it is that an endpoint leaves its commit to the provider, and which one."""
    unknown: Because | None = None
    for user in consumers:
        if ends_after_response(model.version, user.depends) is False:
            continue
        found = writes(model, user.function, user.name)
        if found.left is not None:
            return "high", (found.left, _consumer(user, "leaves the commit to the dependency"))
        if not found.ends and _may_write(user.function):
            unknown = unknown or found.unknown
    if unknown is not None:
        return "medium", (unknown,)
    return "low", ()


def _consumer(user: Consumer, does: str) -> Because:
    function = user.function
    return Because(function, function.function, f"`{function.name}` {does}")


def _may_write(function: Scope) -> bool:
    """An endpoint, and not for GET alone."""
    return not decorator_names(function).isdisjoint(_WRITE)


def _finding(
    model: Model,
    scope: Scope,
    commit: ast.expr,
    uses: list[tuple[Scope, ast.Call]],
    consumers: list[Consumer],
) -> Finding:
    sent = scope.yields[0].node
    confidence, relied = _relied_on(model, consumers)
    return model.finding(
        RULE,
        scope,
        commit,
        f"`{scope.name}` commits after the `yield`, when the response is already sent: a COMMIT "
        "that fails was answered with 200, and the next request may not find the change. Write "
        f'`Depends({scope.name}, scope="function")` (FastAPI 0.121), or commit before returning',
        confidence=confidence,
        because=[
            Because(
                scope,
                sent if isinstance(sent, ast.expr) else None,
                "the response is sent while the generator waits here",
            ),
            *relied,
            *(
                Because(where, call, 'a dependency without scope="function"')
                for where, call in uses
            ),
        ],
    )


RULE = Rule("SES206", "commit-after-yield", "on", judge, fix="unsafe")
