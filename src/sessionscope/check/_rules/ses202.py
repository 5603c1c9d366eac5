"""A session or a mapped object goes to a background task or a thread.

## What it does

Flags a session, something that holds one, or an object loaded through one, that is handed to
``BackgroundTasks``, ``Thread``, ``submit``, ``run_in_executor`` or a task queue's ``.delay``.

## Why it bites in production

A thread or a queue is not waited for. The request ends and closes the session: the work over there
fails with DetachedInstanceError or silently reopens the session, which nobody closes. Meanwhile two
threads use one connection: "This session is provisioning a new connection; concurrent operations
are not permitted".

What a background task finds depends on when FastAPI ends a dependency with ``yield``:

- 0.106 to 0.117, or ``scope="function"``: before the response, so that the task finds a session
  that has ended, as above;
- below 0.106, and from 0.118: after the response and its tasks. The session is open, and its
  connection is missing from the pool until the last task is over ("QueuePool limit reached"), with
  the transaction that the endpoint has left ("idle in transaction"). Objects can still load what
  they miss, and are not flagged.

The message is about the version that the project's lock file, requirements or ``pyproject.toml``
names; where none is named, it tells both. Whether an object is flagged then depends on the version
that is installed beside the checker.

## Example

```python
@app.post("/orders")
def create_order(tasks: BackgroundTasks, db: Session = Depends(get_db)):
    order = crud.create_order(db)
    tasks.add_task(send_mail, db, order)
```

## Use instead

```python
def send_mail(order_id: int) -> None:
    with SessionLocal() as session:
        order = session.get(Order, order_id)

tasks.add_task(send_mail, order.id)
```

## When to ignore

Where the caller waits for the other thread and does not touch the session meanwhile. An object is
not flagged where what was loaded stays loaded: its factory has ``expire_on_commit=False``, or it
was refreshed after the last commit; lazy relationships are missing there all the same.
"""

import ast
import re
from collections.abc import Iterable, Iterator

from sessionscope.check._background import BACKGROUND_TASK, CALLS, Handed, handed_over
from sessionscope.check._committing import late_commit
from sessionscope.check._escapes import Escape, escapes
from sessionscope.check._facts import Binding, CallFact, Scope, Use, position
from sessionscope.check._fastapi import ends_after_response
from sessionscope.check._finding import Confidence, Finding, Rule
from sessionscope.check._model import Because, Model
from sessionscope.check._orm import expire_option, loads_object
from sessionscope.check._values import Value
from sessionscope.check._versions import Version

_OBJECT = re.compile(r"\.?\b(get|first|one|one_or_none|get_or_404|first_or_404)\([^()]*\)$")
_EXPIRES = frozenset({"commit", "rollback", "expire", "expire_all"})
_DETACHED = "DetachedInstanceError, or a session that reopens by itself and is never closed"
_HELD = 'its connection is missing from the pool until the task is over ("QueuePool limit reached")'


def judge(model: Model) -> Iterator[Finding]:
    """Find sessions on their way out of their request."""
    for scope, call in model.calls_of(CALLS):
        handed = handed_over(model, scope, call)
        if handed is None:
            continue
        found = next(escapes(model, handed.nodes, scope), None)
        if found is not None:
            yield _finding(model, scope, call, handed.where, found)
        else:
            yield from _objects(model, scope, call, handed)


def _finding(model: Model, scope: Scope, call: CallFact, where: str, found: Escape) -> Finding:
    confidence: Confidence = "high" if isinstance(found.node, ast.Name) else "medium"
    return model.finding(
        RULE,
        scope,
        call.node,
        f"{where[0].upper()}{where[1:]} gets the session (`{found.shown}`) of this flow, "
        f"{_end_of(model, where, found.value)}. Pass ids, and open a session over there",
        confidence=confidence,
        because=[
            Because(found.value.scope or scope, found.value.node, "the session is made here"),
            Because(found.scope, found.node, f"and goes to {where} here"),
        ],
    )


def _end_of(model: Model, where: str, session: Value) -> str:
    """Return the clause that tells when *session* ends, and what comes of it."""
    if where != BACKGROUND_TASK:
        return f"which does not wait for it: {_DETACHED}"
    # What is installed here need not be what the project runs on.
    version = model.version if model.version is not None and model.version.is_named else None
    match _outlives_tasks(version, session):
        case True:
            return f"which FastAPI {version} ends after the task: {_HELD}"
        case False:
            return f"which ends first: {_DETACHED}"
        case None:
            return f"which ends first ({_DETACHED}), or after the task: then {_HELD}"


def _outlives_tasks(version: Version | None, session: Value) -> bool | None:
    """Return whether *session* ends after the background tasks; None if nobody knows."""
    injected = session.injected
    if injected is not None and injected.provider is not None:
        return ends_after_response(version, injected.call)
    return None if session.received or session.scoped else False


def _objects(model: Model, scope: Scope, call: CallFact, handed: Handed) -> Iterator[Finding]:
    """Mapped objects that were loaded through a session of this function."""
    known = model.session_uses(scope)
    if any(expire_option(value) is False for _, _, value in known):
        return  # what was loaded stays loaded
    where = handed.where
    for name in _names(handed.nodes):
        session = _source(scope, call, name, known)
        if session is None or not _may_miss_something(model, where, name, session, known):
            continue
        bindings = scope.bindings.get(name, [])
        loaded = bindings[0].value if bindings else None
        yield model.finding(
            RULE,
            scope,
            call.node,
            f"{where[0].upper()}{where[1:]} gets `{name}`, an object of a session that may end "
            "first: what is expired or not loaded yet raises DetachedInstanceError there. Pass "
            f"`{name}.id`, and load it over there",
            confidence="medium",
            because=[
                Because(scope, loaded if isinstance(loaded, ast.expr) else None, "loaded here")
            ],
        )
        return


def _names(nodes: Iterable[ast.expr]) -> Iterator[str]:
    for node in nodes:
        for part in node.elts if isinstance(node, ast.Tuple | ast.List) else [node]:
            if isinstance(part, ast.Name):
                yield part.id


def _source(
    scope: Scope, call: CallFact, name: str, known: list[tuple[str, Use, Value]]
) -> Value | None:
    """Return the session through which the object *name* was loaded, or is saved."""
    bindings = scope.bindings.get(name, [])
    for path, use, value in known:
        if value.kind == "session" and any(loads_object(b, path) for b in bindings):
            return value
        if use.name == "add" and _is_about(use, name) and position(use.node) < position(call.node):
            return value
    return Value("session", scoped=True) if any(_queried(b) for b in bindings) else None


def _is_about(use: Use, name: str) -> bool:
    node = use.node
    return isinstance(node, ast.Call) and any(
        isinstance(argument, ast.Name) and argument.id == name for argument in node.args
    )


def _may_miss_something(
    model: Model, where: str, name: str, session: Value, known: list[tuple[str, Use, Value]]
) -> bool:
    """Return whether the object may have to load over there, where its session has ended."""
    if where == BACKGROUND_TASK and _outlives_tasks(model.version, session):
        return False
    refreshed = False
    for _, use, _ in known:
        if use.name == "refresh" and _is_about(use, name):
            refreshed = True
        elif use.name in _EXPIRES and not any(b.kind == "except" for b in use.block.chain()):
            refreshed = False
    provider = session.injected.provider if session.injected is not None else None
    return not refreshed or (provider is not None and late_commit(model, provider) is not None)


def _queried(binding: Binding) -> bool:
    """``Post.query.get(1)`` of Flask-SQLAlchemy."""
    text = ast.unparse(binding.value) if isinstance(binding.value, ast.Call) else ""
    model, dot, rest = text.partition(".query.")
    return bool(dot) and model.isidentifier() and model[:1].isupper() and bool(_OBJECT.search(rest))


RULE = Rule("SES202", "session-to-background", "on", judge)
