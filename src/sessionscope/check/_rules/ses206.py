"""A dependency commits after its ``yield``, when the response is already sent.

## What it does

Flags a FastAPI dependency whose commit stands after the ``yield`` (or is the end of a ``begin()``
block around it), where FastAPI's version and the dependency's scope put that after the response:
below 0.106, and from 0.118 unless ``scope="function"``.

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

Where no client relies on what the answer says, or each endpoint commits by itself: the finding is
of medium confidence unless an endpoint is seen to write and to leave the commit to the dependency.
"""

import ast
from collections.abc import Iterator

from sessionscope.check._committing import late_commit
from sessionscope.check._facts import Scope, decorator_names
from sessionscope.check._fastapi import ends_after_response
from sessionscope.check._finding import Confidence, Finding, Rule
from sessionscope.check._model import Because, Model

_WRITES = frozenset({"add", "add_all", "delete", "merge", "flush"})


def judge(model: Model) -> Iterator[Finding]:
    """Find commits that come too late for the client."""
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
            yield _finding(model, scope, commit, uses)


def _is_not_fastapi(model: Model, scope: Scope, call: ast.Call) -> bool:
    return not model.external(call.func, scope).startswith("fastapi")


def _leaves_its_commit(model: Model, where: Scope, depends: ast.Call) -> bool:
    """Return whether the function with this ``Depends`` writes, and does not commit by itself."""
    for function in where.children:
        for name, bindings in function.bindings.items():
            if any(
                b.kind == "parameter" and (b.value is depends or _mentions(b.annotation, depends))
                for b in bindings
            ):
                used = {use.name for path, use, _ in model.session_uses(function) if path == name}
                return bool(used & _WRITES) and "commit" not in used
    return False


def _mentions(annotation: ast.expr | None, depends: ast.Call) -> bool:
    return annotation is not None and any(node is depends for node in ast.walk(annotation))


def _finding(
    model: Model, scope: Scope, commit: ast.expr, uses: list[tuple[Scope, ast.Call]]
) -> Finding:
    sent = scope.yields[0].node
    relied = any(_leaves_its_commit(model, where, call) for where, call in uses)
    confidence: Confidence = "high" if relied else "medium"
    return model.finding(
        RULE,
        scope,
        commit,
        f"`{scope.name}` commits after the `yield`, when the response is already sent: a COMMIT "
        "that fails was answered with 200, and the next request may not find the row. Write "
        f'`Depends({scope.name}, scope="function")` (FastAPI 0.121), or commit before returning',
        confidence=confidence,
        because=[
            Because(
                scope,
                sent if isinstance(sent, ast.expr) else None,
                "the response is sent while the generator waits here",
            ),
            *(
                Because(where, call, 'a dependency without scope="function"')
                for where, call in uses
            ),
        ],
    )


RULE = Rule("SES206", "commit-after-yield", "on", judge, fix="unsafe")
