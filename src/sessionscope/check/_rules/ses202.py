"""A session or a mapped object goes to a background task or a thread.

## What it does

Flags a session, something that holds one, or an object loaded through one, that is handed to
``BackgroundTasks``, ``Thread``, ``submit``, ``run_in_executor`` or a task queue's ``.delay``.

## Why it bites in production

The request ends first and closes the session: the background work fails with
DetachedInstanceError or silently reopens the session, which nobody closes. Meanwhile two threads
use one connection: "This session is provisioning a new connection; concurrent operations are not
permitted".

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

Where the caller waits for the other thread and does not touch the session meanwhile. An object of
a factory with ``expire_on_commit=False`` is not flagged: what was loaded stays loaded.
"""

import ast
import re
from collections.abc import Iterator

from sessionscope.check._escapes import Escape, escapes
from sessionscope.check._facts import Binding, CallFact, Scope, position
from sessionscope.check._finding import Confidence, Finding, Rule
from sessionscope.check._model import Because, Model
from sessionscope.check._orm import expire_option, loads_object

_TASK_CALLS = (
    "delay",
    "apply_async",
    "s",
    "si",
    "send",
    "kiq",
    "enqueue",
    "enqueue_job",
    "send_task",
    "signature",
)
_CALLS = (
    *_TASK_CALLS,
    "add_task",
    "BackgroundTask",
    "Thread",
    "Process",
    "Timer",
    "submit",
    "map",
    "run_in_executor",
)

_OBJECT = re.compile(r"\.?\b(get|first|one|one_or_none|get_or_404|first_or_404)\([^()]*\)$")


def judge(model: Model) -> Iterator[Finding]:
    """Find sessions on their way out of their request."""
    for scope, call in model.calls_of(_CALLS):
        taken = _taken(model, scope, call)
        if taken is None:
            continue
        where, nodes = taken
        found = next(escapes(model, nodes, scope), None)
        if found is not None:
            yield _finding(model, scope, call, where, found)
        else:
            yield from _objects(model, scope, call, where, nodes)


def _taken(model: Model, scope: Scope, call: CallFact) -> tuple[str, list[ast.expr]] | None:
    """Return what runs elsewhere, and the expressions that go there."""
    node = call.node
    function = node.func
    last = call.name
    nodes = [*node.args, *(k.value for k in node.keywords)]
    match last:
        case "add_task" if _base_is(model, scope, function, "BackgroundTasks", "BackgroundTask"):
            return "a background task", nodes
        case "BackgroundTask" if model.external(function, scope).startswith(
            ("starlette", "fastapi")
        ):
            return "a background task", nodes
        case "Thread" | "Process" | "Timer" if _is_thread(model.external(function, scope)):
            return "a thread", nodes
        case "submit" | "map" if _is_pool(model, scope, function):
            return "a thread pool", nodes
        case "run_in_executor" if call.role != "await":
            return "a thread pool", nodes[1:]
        case _ if last in _TASK_CALLS and _is_task(model, scope, function):
            return "a task queue", nodes
        case _:
            return None


def _base_is(model: Model, scope: Scope, function: ast.expr, *names: str) -> bool:
    if not isinstance(function, ast.Attribute):
        return False
    known = model.external(function.value, scope)
    top, _, rest = known.partition(".")
    return top in {"fastapi", "starlette"} and rest.rpartition(".")[2] in names


def _is_thread(name: str) -> bool:
    return name.partition(".")[0] in {"threading", "multiprocessing"}


def _is_pool(model: Model, scope: Scope, function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and model.external(function.value, scope).startswith(
        "concurrent.futures"
    )


def _is_task(model: Model, scope: Scope, function: ast.expr) -> bool:
    """``task.delay()`` of a function that a task decorator made a task."""
    if not isinstance(function, ast.Attribute):
        return False
    found = model.value(function.value, scope)
    if found is not None and found.kind == "function" and isinstance(found.target, Scope):
        return model.context(found.target) == "task"
    name = found.name.partition(".")[0] if found is not None else ""
    return name in {"celery", "rq", "dramatiq"} and function.attr != "send"


def _finding(model: Model, scope: Scope, call: CallFact, where: str, found: Escape) -> Finding:
    confidence: Confidence = "high" if isinstance(found.node, ast.Name) else "medium"
    return model.finding(
        RULE,
        scope,
        call.node,
        f"{where[0].upper()}{where[1:]} gets the session (`{found.shown}`) of this flow, which "
        "ends first: DetachedInstanceError, or a session that reopens by itself and is never "
        "closed. Pass ids, and open a session over there",
        confidence=confidence,
        because=[
            Because(found.value.scope or scope, found.value.node, "the session is made here"),
            Because(found.scope, found.node, f"and goes to {where} here"),
        ],
    )


def _objects(
    model: Model, scope: Scope, call: CallFact, where: str, nodes: list[ast.expr]
) -> Iterator[Finding]:
    """Mapped objects that were loaded through a session of this function."""
    known = model.session_uses(scope)
    if any(expire_option(value) is False for _, _, value in known):
        return  # what was loaded stays loaded
    sessions = {path for path, _, value in known if value.kind == "session"}
    added = {
        argument.id
        for _, use, _ in known
        if use.name == "add" and isinstance(use.node, ast.Call)
        for argument in use.node.args
        if isinstance(argument, ast.Name) and position(use.node) < position(call.node)
    }
    for node in nodes:
        parts = node.elts if isinstance(node, ast.Tuple | ast.List) else [node]
        for part in parts:
            if not isinstance(part, ast.Name):
                continue
            bindings = scope.bindings.get(part.id, [])
            if (
                part.id in added
                or any(loads_object(b, path) for b in bindings for path in sessions)
                or any(_queried(b) for b in bindings)
            ):
                yield model.finding(
                    RULE,
                    scope,
                    call.node,
                    f"{where[0].upper()}{where[1:]} gets `{part.id}`, an object of a session that "
                    "ends first: its expired attributes raise DetachedInstanceError there. Pass "
                    f"`{part.id}.id`, and load it over there",
                    confidence="medium",
                    because=[
                        Because(
                            scope,
                            bindings[0].value if isinstance(bindings[0].value, ast.expr) else None,
                            "loaded here",
                        )
                    ],
                )
                return


def _queried(binding: Binding) -> bool:
    """``Post.query.get(1)`` of Flask-SQLAlchemy."""
    text = ast.unparse(binding.value) if isinstance(binding.value, ast.Call) else ""
    model, dot, rest = text.partition(".query.")
    return bool(dot) and model.isidentifier() and model[:1].isupper() and bool(_OBJECT.search(rest))


RULE = Rule("SES202", "session-to-background", "on", judge)
